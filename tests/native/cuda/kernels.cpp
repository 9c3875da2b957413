// Our CUDA kernels, run by the emulator, for test_cuda.py. Sizes are in units of 128 values, strides in bytes.

#ifndef GGML_USE_HIP
#include "rq-fattn.cuh"
#endif // GGML_USE_HIP
#include "rq-kernels.cuh"
#include "rq-vec.cuh"

// ggml_cuda_rq_rows as Python has it
struct rows {
    int64_t ne[3];
    int64_t nb[4];

    operator ggml_cuda_rq_rows() const {
        return { init_fastdiv_values(ne[0]), init_fastdiv_values(ne[1]), init_fastdiv_values(ne[2]), nb[0], nb[1], nb[2], nb[3] };
    }
};

static dim3 warps(int64_t n) {
    return { (uint32_t) ((n + GGML_CUDA_RQ_WARPS - 1)/GGML_CUDA_RQ_WARPS), 1, 1 };
}

template <typename F>
static void run(int64_t n_warps, const F & f) {
    emulator::launch(warps(n_warps), { 32, GGML_CUDA_RQ_WARPS, 1 }, f, []() {});
}

template <typename F>
static void with_bits(int bits, const F & f) {
    switch (bits) {
        case 2:  f(std::integral_constant<int, 2>()); break;
        case 3:  f(std::integral_constant<int, 3>()); break;
        default: f(std::integral_constant<int, 4>()); break;
    }
}

extern "C" void emu_quantize(int bits, int scale_kind, int64_t n, const char * src, char * dst,
        const rows * s, const rows * d) {
    with_bits(bits, [&](auto b) { run(n, [&]() { ggml_cuda_rq_quantize_kernel<b.value>(src, dst, n, *s, *d, scale_kind); }); });
}

extern "C" void emu_dequantize(int bits, int to_f16, int64_t n, const char * src, char * dst,
        const rows * s, const rows * d) {
    with_bits(bits, [&](auto b) {
        run((n + 1)/2, [&]() {
            if (to_f16) {
                ggml_cuda_rq_dequantize_kernel<b.value, half>(src, dst, n, *s, *d);
            } else {
                ggml_cuda_rq_dequantize_kernel<b.value, float>(src, dst, n, *s, *d);
            }
        });
    });
}

extern "C" void emu_copy(int bits, int64_t n, const char * src, char * dst, const rows * s, const rows * d) {
    with_bits(bits, [&](auto b) { run(n, [&]() { ggml_cuda_rq_copy_kernel<b.value>(src, dst, n, *s, *d); }); });
}

// ne1, nb1: of the indices in set_rows; nb: of dst in set_rows, of src in get_rows
extern "C" void emu_set_rows(int bits, int wide, int64_t n, const char * src, const char * idx, char * dst,
        const rows * s, const int64_t * ne1, const int64_t * nb1, const int64_t * nb) {
    with_bits(bits, [&](auto b) {
        run(n, [&]() {
            if (wide) {
                ggml_cuda_rq_set_rows_kernel<b.value, int64_t>(src, idx, dst, n, *s, init_fastdiv_values(ne1[1]), init_fastdiv_values(ne1[2]), nb1[0], nb1[1], nb1[2], nb[1], nb[2], nb[3], 0);
            } else {
                ggml_cuda_rq_set_rows_kernel<b.value, int32_t>(src, idx, dst, n, *s, init_fastdiv_values(ne1[1]), init_fastdiv_values(ne1[2]), nb1[0], nb1[1], nb1[2], nb[1], nb[2], nb[3], 0);
            }
        });
    });
}

extern "C" void emu_get_rows(int bits, int64_t n, const char * src, const char * idx, char * dst,
        const rows * d, const int64_t * nb1, const int64_t * nb) {
    with_bits(bits, [&](auto b) {
        run((n + 1)/2, [&]() { ggml_cuda_rq_get_rows_kernel<b.value>(src, idx, dst, n, *d, nb1[0], nb1[1], nb1[2], nb[1], nb[2], nb[3]); });
    });
}

// ggml_cuda_rq_gather as Python has it
struct gather {
    half       * dst;
    const char * src[3];
    int64_t      nb[3][3];
    int32_t      end[3], first, rows, D, heads, sequences;
};

extern "C" void emu_gather(const gather * g) {
    ggml_cuda_rq_gather a = { g->dst, { g->src[0], g->src[1], g->src[2] }, {}, { g->end[0], g->end[1], g->end[2] }, g->first, g->rows, g->D,
        init_fastdiv_values(g->heads), init_fastdiv_values(g->rows - g->first) };
    memcpy(a.nb, g->nb, sizeof(a.nb));
    const int64_t n = (int64_t) (g->rows - g->first)*g->heads*g->sequences;
    run(n, [&]() { ggml_cuda_rq_gather_kernel(a, n); });
}

extern "C" void emu_rotate(int n, const ggml_cuda_rq_jobs * jobs) {
    int64_t rows = 0;
    for (int i = 0; i < jobs->n; i++) {
        rows += jobs->job[i].rows;
    }
    run(rows, [&]() {
        if (n == 128) {
            ggml_cuda_rq_rotate_kernel<128>(*jobs);
        } else {
            ggml_cuda_rq_rotate_kernel<256>(*jobs);
        }
    });
}

// ---- what upstream's vector attention kernel asks of a type ----

template <int bits, int D, int nthreads>
static float vec_dot(const char * k, const int32_t * q, const float * q_scale) {
    float sum = 0.0f;
    for (int t = 0; t < nthreads; t++) { // lanes, whose sums the kernel adds up
        int    mine[D/4/nthreads];
        float2 scale[D/4/nthreads];
        for (int i = 0; i < D/4/nthreads; i++) {
            mine[i]  = q[nthreads*i + t];
            scale[i] = make_float2(q_scale[(nthreads*i + t)/8], NAN);
        }
        sum += ggml_cuda_rq_vec_dot<bits, D, nthreads>(k, mine, scale, t);
    }
    return sum;
}

template <int bits, int D>
static float vec_dot(int nthreads, const char * k, const int32_t * q, const float * q_scale) {
    switch (nthreads) {
        case 2:  return vec_dot<bits, D,  2>(k, q, q_scale);
        case 4:  return vec_dot<bits, D,  4>(k, q, q_scale);
        default: return vec_dot<bits, D, 32>(k, q, q_scale);
    }
}

// q: head_dim int8, q_scale: of each 32 of them
extern "C" float emu_vec_dot(int bits, int head_dim, int nthreads, const char * k, const int32_t * q, const float * q_scale) {
    float sum = 0.0f;
    with_bits(bits, [&](auto b) {
        sum = head_dim == 128 ? vec_dot<b.value, 128>(nthreads, k, q, q_scale) : vec_dot<b.value, 256>(nthreads, k, q, q_scale);
    });
    return sum;
}

extern "C" void emu_vec_dequantize(int bits, int64_t n, const char * v, float * as_f32, half * as_f16) {
    with_bits(bits, [&](auto b) {
        for (int64_t i = 0; i < n; i += 4) {
            ggml_cuda_rq_vec_dequantize<b.value>(v, i, as_f32 + i);
            ggml_cuda_rq_vec_dequantize<b.value>(v, i, as_f16 + i);
        }
    });
}

// ---- attention, which is for tensor cores of NVIDIA ----

#ifndef GGML_USE_HIP

#define SHARED_BYTES (128*1024)

alignas(16) uint4 ggml_cuda_rq_fa_shared[SHARED_BYTES/sizeof(uint4)];

struct attention {
    int32_t queries, heads, kv, heads_kv, sequences; // Q: [D, queries, heads, sequences], K and V: [D, kv, heads_kv, sequences]
    int32_t nb_q[3];
    int32_t nb_k[2];
    int64_t nb_k3;
    int32_t nb_v[2];
    int64_t nb_v3;
    int32_t mask_sequences;
    int32_t nb_mask; // of a query; of a sequence it is queries times that
    int32_t parts;   // CUDA blocks that share the rows of K and V
    float   scale, max_bias, softcap;
};

static ggml_cuda_rq_fa_kernel find(int type_k, int head_dim, int type_v) {
    const ggml_type v = (ggml_type) type_v;
    if (type_k == type_v && type_k == GGML_TYPE_Q8_0) {
        return ggml_cuda_rq_fa_find_same<ggml_cuda_rq_kv_q8_0>(head_dim);
    }
    if (type_k == type_v && type_k == GGML_TYPE_Q4_0) {
        return ggml_cuda_rq_fa_find_same<ggml_cuda_rq_kv_q4_0>(head_dim);
    }
    switch (type_k) {
        case GGML_TYPE_F16:     return ggml_cuda_rq_fa_find<ggml_cuda_rq_kv_f16,  false>(head_dim, v);
        case GGML_TYPE_Q8_0:    return ggml_cuda_rq_fa_find<ggml_cuda_rq_kv_q8_0, false>(head_dim, v);
        case GGML_TYPE_PLANAR2: return ggml_cuda_rq_fa_find<ggml_cuda_rq_kv<2>,   true >(head_dim, v);
        case GGML_TYPE_PLANAR3: return ggml_cuda_rq_fa_find<ggml_cuda_rq_kv<3>,   true >(head_dim, v);
        case GGML_TYPE_PLANAR4: return ggml_cuda_rq_fa_find<ggml_cuda_rq_kv<4>,   true >(head_dim, v);
        default:                return {};
    }
}

static void combine(int n, const float * parts, const float2 * meta, float * dst, int64_t rows, int n_parts, int family, int mode) {
    run(rows, [&]() {
        if (n == 128) {
            ggml_cuda_rq_combine_kernel<128>(parts, meta, dst, rows, n_parts, family, mode);
        } else {
            ggml_cuda_rq_combine_kernel<256>(parts, meta, dst, rows, n_parts, family, mode);
        }
    });
}

extern "C" int emu_parts(int64_t tiles, int64_t places, int64_t passes) {
    return ggml_cuda_rq_parts(tiles, places, passes);
}

extern "C" void emu_combine(int n, const float * parts, const float2 * meta, float * dst, int64_t rows, int n_parts, int family, int mode) {
    combine(n, parts, meta, dst, rows, n_parts, family, mode);
}

// dst: [D, heads, queries, sequences]; recent: null without recent rows
// returns the rows of a pass, or 0 when there is no such kernel
extern "C" int emu_attention(int head_dim, int type_k, int type_v, const attention * a, const char * q, const char * k, const char * v,
        const char * mask, const char * sinks, const int32_t * kv_max, const ggml_cuda_rq_recent * recent, float * dst) {
    const ggml_cuda_rq_fa_kernel kernel = find(type_k, head_dim, type_v);
    if (!kernel.kernel) {
        return 0;
    }
    const ggml_cuda_rq_recent none = {};
    const ggml_cuda_rq_recent rows_of = recent ? *recent : none;
    const size_t nb_shared = recent ? kernel.nb_recent : kernel.nb_shared;
    if (nb_shared > SHARED_BYTES) {
        abort();
    }
    const int parts = a->parts + rows_of.parts;
    const int  group   = a->heads/a->heads_kv;
    const int  heads   = ggml_cuda_rq_fa_heads(group);
    const int  queries = GGML_CUDA_RQ_FA_COLS/heads;
    const dim3 grid    = { (uint32_t) ((a->queries + queries - 1)/queries), (uint32_t) parts,
                           (uint32_t) ((group + heads - 1)/heads*a->heads_kv*a->sequences) };

    const uint32_t n_head_log2 = 1u << (uint32_t) floorf(log2f((float) a->heads));
    const float    m0 = powf(2.0f, -(a->max_bias       )/n_head_log2);
    const float    m1 = powf(2.0f, -(a->max_bias / 2.0f)/n_head_log2);

    const size_t rows = (size_t) a->queries*a->heads*a->sequences;
    std::vector<float>  part(rows*parts*head_dim, NAN);
    std::vector<float2> meta(rows*parts, float2{ NAN, NAN });

    emulator::launch(grid, { 32, GGML_CUDA_RQ_FA_WARPS, 1 }, [&]() {
        kernel.kernel(q, k, v, mask, sinks, kv_max, part.data(), meta.data(),
            a->softcap != 0.0f ? a->scale/a->softcap : a->scale, a->max_bias, m0, m1, n_head_log2, a->softcap,
            head_dim, uint3{ 0, 0, (uint32_t) a->queries }, a->heads, a->sequences, a->nb_q[0], a->nb_q[1], a->nb_q[2],
            head_dim, a->kv, a->heads_kv, a->sequences, a->nb_k[0], a->nb_k[1], a->nb_k3, a->nb_v[0], a->nb_v[1], a->nb_v3,
            a->queries, 1, a->mask_sequences, a->nb_mask, a->nb_mask*a->queries, (int64_t) a->nb_mask*a->queries,
            rows_of);
    }, []() { memset(ggml_cuda_rq_fa_shared, 0xFF, sizeof(ggml_cuda_rq_fa_shared)); });

    combine(head_dim, part.data(), meta.data(), dst, rows, parts, -1, 0);
    return kernel.rows;
}

#endif // GGML_USE_HIP
