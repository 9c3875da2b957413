#version 450

#include "generic_binary_head.glsl"
#include "rq_decode.glsl"

layout (constant_id = 1) const uint RQ_BITS = 3;
layout (constant_id = 2) const uint RQ_N    = 128;

layout (local_size_x = 32, local_size_y = 1, local_size_z = 1) in;

// a thread for four values
void main() {
    const uint i00 = gl_GlobalInvocationID.x*4u;
    if (i00 >= p.ne00) {
        return;
    }

    for (uint i = gl_GlobalInvocationID.z; i < p.ne11*p.ne12; i += gl_NumWorkGroups.z) {
        const uint i11 = i / p.ne12;
        const uint i12 = i % p.ne12;

        for (uint i10 = gl_GlobalInvocationID.y; i10 < p.ne10; i10 += gl_NumWorkGroups.y) {
            const uint i01 = data_b[get_boffset() + i10*p.nb10 + i11*p.nb11 + i12*p.nb12];

            const uint ib  = get_aoffset() + i01*p.nb01 + i11*p.nb02 + i12*p.nb03 + i00/RQ_N;
            const uint out_idx = get_doffset() + i10*p.nb21 + i11*p.nb22 + i12*p.nb23 + i00;

            vec4 v;
            RQ_DEQUANTIZE4(v, data_a, ib, i00 % RQ_N, RQ_BITS, RQ_N)

            [[unroll]] for (uint k = 0; k < 4; ++k) {
                data_d[out_idx + k] = v[k];
            }
        }
    }
}
