#version 450

#include "generic_unary_head.glsl"
#include "rq_decode.glsl"

layout (local_size_x_id = 0, local_size_y = 1, local_size_z = 1) in;

layout (constant_id = 1) const uint RQ_BITS = 3;
layout (constant_id = 2) const uint RQ_N    = 128;

// a workgroup for each block, a thread for four values; where they go follows from their place among all, since dst may be
// of another shape
void main() {
    const uint first = gl_WorkGroupID.z*262144u + gl_WorkGroupID.y*512u + gl_WorkGroupID.x*RQ_N;
    if (first >= p.ne) {
        return;
    }

    const uint i = gl_LocalInvocationID.x*4u;

    vec4 v;
    RQ_DEQUANTIZE4(v, data_a, get_aoffset() + src0_idx_quant(first, RQ_N), i, RQ_BITS, RQ_N)

    [[unroll]] for (uint k = 0; k < 4; ++k) {
        data_d[get_doffset() + dst_idx(first + i + k)] = D_TYPE(v[k]);
    }
}
