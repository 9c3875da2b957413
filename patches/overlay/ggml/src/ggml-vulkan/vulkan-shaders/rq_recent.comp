#version 450

#extension GL_EXT_control_flow_attributes : require
#extension GL_EXT_shader_16bit_storage : require

// Recent rows (ggml-rq-types.h) beside what upstream's attention has left of the cache: parts, each a sum of values, the sum of
// their weights and the maximum that these are relative to. A workgroup for a query of a head; a thread for a row, then for
// every 128th value.

layout (local_size_x = 128, local_size_y = 1, local_size_z = 1) in;

layout (push_constant) uniform parameter {
    uint n_split; uint n_held; uint n_new; uint group;
    uint nb_q1;     uint nb_q2;     uint nb_q3; // of rows, heads and streams
    uint nb_k1;     uint nb_k2;     uint nb_k3;
    uint nb_v1;     uint nb_v2;     uint nb_v3;
    uint nb_k_new1; uint nb_k_new2; uint nb_k_new3;
    uint nb_v_new1; uint nb_v_new2; uint nb_v_new3;
    uint nb_mask; uint nb_mask3; uint first;
    uint offsets;
    uint n_head_log2_sinks;
    uint head_k; uint head_v;
    float scale; float softcap; float m0; float m1;
} p;

layout (binding = 0) readonly buffer A { float data_a[]; };
layout (binding = 1) readonly buffer S { float data_s[]; };
layout (binding = 2) writeonly buffer D { float data_d[]; };
layout (binding = 3) readonly buffer Q { float data_q[]; };
layout (binding = 4) readonly buffer K { float16_t data_k[]; };
layout (binding = 5) readonly buffer V { float16_t data_v[]; };
layout (binding = 6) readonly buffer KNew { float data_k_new[]; };
layout (binding = 7) readonly buffer VNew { float data_v_new[]; };
layout (binding = 8) readonly buffer M { float16_t data_m[]; };

#define THREADS 128u
#define NEG_FLT_MAX_OVER_2 uintBitsToFloat(0xFEFFFFFFu) // as upstream's shaders have it where they have seen nothing

shared float sh_q[576];
shared float sh_max[THREADS];
shared float sh_p[THREADS];

void main() {
    const uint tid   = gl_LocalInvocationID.x;
    const uint head  = gl_WorkGroupID.x;
    const uint query = gl_WorkGroupID.y;
    const uint strm  = gl_WorkGroupID.z;
    const uint heads = gl_NumWorkGroups.x;
    const uint place = query + gl_NumWorkGroups.y*strm;

    for (uint d = tid; d < p.head_k; d += THREADS) {
        sh_q[d] = data_q[query*p.nb_q1 + head*p.nb_q2 + strm*p.nb_q3 + d]*p.scale;
    }

    // the parts, and a sink
    const uint sums = p.head_v*heads*gl_NumWorkGroups.y*gl_NumWorkGroups.z*p.n_split;
    const bool sinks = (p.n_head_log2_sinks >> 24) != 0u;

    float m = sinks ? data_s[head] : NEG_FLT_MAX_OVER_2;
    for (uint k = 0; k < p.n_split; ++k) {
        m = max(m, data_a[sums + 2u*heads*(k + p.n_split*place) + heads + head]);
    }
    float l = sinks ? exp(data_s[head] - m) : 0.0;
    float v[4] = float[4](0.0, 0.0, 0.0, 0.0);
    for (uint k = 0; k < p.n_split; ++k) {
        const uint  at = sums + 2u*heads*(k + p.n_split*place) + head;
        const float w  = exp(data_a[at + heads] - m);
        l += w*data_a[at];
        [[unroll]] for (uint j = 0; j < 4; ++j) {
            const uint d = j*THREADS + tid;
            if (d < p.head_v) {
                v[j] += w*data_a[(heads*(k + p.n_split*place) + head)*p.head_v + d];
            }
        }
    }

    // ALiBi
    const uint  n_head_log2 = p.n_head_log2_sinks & 0xffffu;
    const float slope = head < n_head_log2 ? pow(p.m0, float(head + 1u)) : pow(p.m1, float(2u*(head - n_head_log2) + 1u));

    const uint head_kv  = head/p.group;
    const uint at_k     = ( p.offsets         & 0xffu) + head_kv*p.nb_k2     + strm*p.nb_k3;
    const uint at_v     = ((p.offsets >>  8u) & 0xffu) + head_kv*p.nb_v2     + strm*p.nb_v3;
    const uint at_k_new = ((p.offsets >> 16u) & 0xffu) + head_kv*p.nb_k_new2 + strm*p.nb_k_new3;
    const uint at_v_new = ( p.offsets >> 24u         ) + head_kv*p.nb_v_new2 + strm*p.nb_v_new3;
    const uint n        = p.n_held + p.n_new;

    for (uint r0 = 0; r0 < n; r0 += THREADS) {
        const uint row = r0 + tid;

        barrier();
        float s = NEG_FLT_MAX_OVER_2;
        const float mask = row < n ? float(data_m[query*p.nb_mask + strm*p.nb_mask3 + p.first + row]) : NEG_FLT_MAX_OVER_2;
        if (mask > -65504.0) {
            s = 0.0;
            if (row < p.n_held) {
                for (uint d = 0; d < p.head_k; ++d) {
                    s += sh_q[d]*float(data_k[at_k + row*p.nb_k1 + d]);
                }
            } else {
                for (uint d = 0; d < p.head_k; ++d) {
                    s += sh_q[d]*data_k_new[at_k_new + (row - p.n_held)*p.nb_k_new1 + d];
                }
            }
            if (p.softcap != 0.0) {
                s = p.softcap*tanh(s);
            }
            s += slope*mask;
        }
        sh_max[tid] = s;
        barrier();

        float top = m;
        for (uint i = 0; i < THREADS; ++i) {
            top = max(top, sh_max[i]);
        }
        const float w = exp(m - top);
        m = top;
        sh_p[tid] = s > NEG_FLT_MAX_OVER_2 ? exp(s - m) : 0.0;
        barrier();

        l *= w;
        [[unroll]] for (uint j = 0; j < 4; ++j) {
            v[j] *= w;
        }
        for (uint i = 0; i < min(THREADS, n - r0); ++i) {
            const float e = sh_p[i];
            if (e == 0.0) {
                continue; // hidden, or too small to be seen
            }
            l += e;
            [[unroll]] for (uint j = 0; j < 4; ++j) {
                const uint d = j*THREADS + tid;
                if (d < p.head_v) {
                    v[j] += e*(r0 + i < p.n_held ? float(data_v[at_v + (r0 + i)*p.nb_v1 + d]) :
                        data_v_new[at_v_new + (r0 + i - p.n_held)*p.nb_v_new1 + d]);
                }
            }
        }
    }

    [[unroll]] for (uint j = 0; j < 4; ++j) {
        const uint d = j*THREADS + tid;
        if (d < p.head_v) {
            data_d[(place*heads + head)*p.head_v + d] = l == 0.0 ? 0.0 : v[j]/l;
        }
    }
}
