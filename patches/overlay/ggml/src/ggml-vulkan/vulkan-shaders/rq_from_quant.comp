#version 450

#include "types.glsl"
#include "generic_unary_head.glsl"
#include "dequant_funcs.glsl"

// Upstream's types of 32 values to f16: a workgroup for each block, a thread for four values; 16 are what its tables take to load
layout(local_size_x = 16, local_size_y = 1, local_size_z = 1) in;

void main() {
#ifdef NEEDS_INIT_IQ_SHMEM
    init_iq_shmem(gl_WorkGroupSize);
#endif

    const uint first = gl_WorkGroupID.z*262144u + gl_WorkGroupID.y*512u + gl_WorkGroupID.x*QUANT_K;
    const uint j     = gl_LocalInvocationID.x*4u;
    if (first >= p.ne || j >= QUANT_K) {
        return;
    }

    const uint ib = get_aoffset() + src0_idx_quant(first, QUANT_K);
    const vec2 dm = get_dm(ib, 0u);
    const vec4 v  = dequantize4(ib, j/QUANT_R, 0u)*dm.x + vec4(dm.y);

    const uint to = get_doffset() + dst_idx(first);
    [[unroll]] for (uint k = 0; k < 4; ++k) {
        // where two values share a byte, the second one is half a block behind
        const uint at = QUANT_R == 2 ? j/2u + (k/2u) + (k & 1u)*(QUANT_K/2u) : j + k;
        data_d[to + at] = D_TYPE(v[k]);
    }
}
