#version 450

#extension GL_EXT_control_flow_attributes : require

// A rotation of N values, see ggml-rq.h: B, or B*H*B with H a Walsh-Hadamard matrix. A thread for each value.

#include "rq_rotations.glsl"

layout (constant_id = 0) const uint FAMILY = 1;
layout (constant_id = 1) const uint N      = 128;

layout (local_size_x = 256, local_size_y = 1, local_size_z = 1) in;

layout (push_constant) uniform parameter {
    uint n_rows;
    uint src_offset;
    uint dst_offset;
    uint full;
} p;

layout (binding = 0) readonly buffer A { float data_a[]; };
layout (binding = 1) writeonly buffer D { float data_d[]; };

shared float sh[256];

// this thread's value of B*x, x being the values of all threads
float blocks(float x) {
    const uint tid = gl_LocalInvocationID.x;
    const uint i   = tid % min(N, 128u);

    barrier();
    sh[tid] = x;
    barrier();

    if (FAMILY == 0u) {
        const float c = RQ_PLANAR[i & ~1u];
        const float s = RQ_PLANAR[i | 1u];
        return (i & 1u) == 0u ? c*x + s*sh[tid ^ 1u] : s*sh[tid ^ 1u] - c*x;
    }
    const uint width = FAMILY == 1u ? 4u : 3u;
    if (FAMILY == 2u && i >= min(N, 128u)/3u*3u) {
        return x;
    }
    float res = 0.0;
    [[unroll]] for (uint k = 0; k < width; ++k) {
        res += (FAMILY == 1u ? RQ_ISO[4u*i + k] : RQ_ROTOR[3u*i + k])*sh[tid - i % width + k];
    }
    return res;
}

void main() {
    const uint tid  = gl_LocalInvocationID.x;
    const uint rows = 256u/N;

    for (uint r0 = gl_WorkGroupID.x*rows; r0 < p.n_rows; r0 += gl_NumWorkGroups.x*rows) {
        const uint row = r0 + tid/N;
        const uint at  = row*N + tid % N;

        float x = blocks(row < p.n_rows ? data_a[p.src_offset + at] : 0.0);

        if (p.full != 0u) {
            [[unroll]] for (uint h = 1u; h < N; h *= 2u) {
                barrier();
                sh[tid] = x;
                barrier();
                x = (tid & h) == 0u ? x + sh[tid ^ h] : sh[tid ^ h] - x;
            }
            x = blocks(x*inversesqrt(float(N)));
        }
        if (row < p.n_rows) {
            data_d[p.dst_offset + at] = x;
        }
    }
}
