#version 450

#include "dequant_head.glsl"
#include "rq_decode.glsl"

layout (constant_id = 1) const uint RQ_BITS = 3;
layout (constant_id = 2) const uint RQ_N    = 128;

layout (local_size_x = 256, local_size_y = 1, local_size_z = 1) in;

layout (binding = 0) readonly buffer A { uint16_t data_a[]; };
layout (binding = 1) writeonly buffer D { D_TYPE data_d[]; };

// K or V in f16 for many queries: [head_dim, heads, rows, streams] is written as [head_dim, rows, heads, streams], which is what
// upstream's attention then reads; 16 values for each thread
void main() {
    const uint size = p.M, heads = p.K, rows = p.stride_a;

    [[unroll]] for (uint k = 0; k < 4; ++k) {
        const uint e = (gl_WorkGroupID.x*4u + k)*1024u + gl_LocalInvocationID.x*4u;
        if (e >= p.nel) {
            return;
        }

        vec4 v;
        RQ_DEQUANTIZE4(v, data_a, e/RQ_N, e % RQ_N, RQ_BITS, RQ_N)

        const uint row  = e/size;
        const uint head = row % heads;
        const uint cell = row/heads;
        const uint to   = ((cell/rows*heads + head)*rows + cell % rows)*size + e % size;

        [[unroll]] for (uint j = 0; j < 4; ++j) {
            data_d[to + j] = D_TYPE(v[j]);
        }
    }
}
