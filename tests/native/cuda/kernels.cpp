// Our CUDA kernels, run by the emulator, for test_cuda.py. Sizes are in blocks of 128 or 64 values, strides in bytes.

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

// so many lanes for each of n
template <typename F>
static void run(int64_t n, int lanes, const F & f) {
    run((n*lanes + 31)/32, f);
}

template <int N, typename F>
static void with_code_of(int bits, const F & f) {
    switch (bits) {
        case 2:  f(ggml_cuda_rq_code<2, N>()); break;
        case 3:  f(ggml_cuda_rq_code<3, N>()); break;
        default: f(ggml_cuda_rq_code<4, N>()); break;
    }
}

// block: values of one
template <typename F>
static void with_code(int bits, int block, const F & f) {
    if (block == 64) {
        with_code_of<64>(bits, f);
    } else {
        with_code_of<128>(bits, f);
    }
}

extern "C" void emu_quantize(int bits, int block, int scale_kind, int64_t n, const char * src, char * dst,
        const rows * s, const rows * d) {
    with_code(bits, block, [&](auto of) {
        typedef decltype(of) code;
        run(n, block/4, [&]() { ggml_cuda_rq_quantize_kernel<code>(src, dst, n, *s, *d, scale_kind); });
    });
}

extern "C" void emu_dequantize(int bits, int block, int to_f16, int64_t n, const char * src, char * dst,
        const rows * s, const rows * d) {
    with_code(bits, block, [&](auto of) {
        typedef decltype(of) code;
        run(n, block/8, [&]() {
            if (to_f16) {
                ggml_cuda_rq_dequantize_kernel<code, half>(src, dst, n, *s, *d);
            } else {
                ggml_cuda_rq_dequantize_kernel<code, float>(src, dst, n, *s, *d);
            }
        });
    });
}

extern "C" void emu_copy(int bits, int block, int64_t n, const char * src, char * dst, const rows * s, const rows * d) {
    with_code(bits, block, [&](auto of) {
        typedef decltype(of) code;
        run(n, [&]() { ggml_cuda_rq_copy_kernel<code>(src, dst, n, *s, *d); });
    });
}

// ne1, nb1: of the indices in set_rows; nb: of dst in set_rows, of src in get_rows
extern "C" void emu_set_rows(int bits, int block, int wide, int64_t n, const char * src, const char * idx, char * dst,
        const rows * s, const int64_t * ne1, const int64_t * nb1, const int64_t * nb) {
    with_code(bits, block, [&](auto of) {
        typedef decltype(of) code;
        run(n, block/4, [&]() {
            if (wide) {
                ggml_cuda_rq_set_rows_kernel<code, int64_t>(src, idx, dst, n, *s, init_fastdiv_values(ne1[1]), init_fastdiv_values(ne1[2]), nb1[0], nb1[1], nb1[2], nb[1], nb[2], nb[3], 0);
            } else {
                ggml_cuda_rq_set_rows_kernel<code, int32_t>(src, idx, dst, n, *s, init_fastdiv_values(ne1[1]), init_fastdiv_values(ne1[2]), nb1[0], nb1[1], nb1[2], nb[1], nb[2], nb[3], 0);
            }
        });
    });
}

extern "C" void emu_get_rows(int bits, int block, int64_t n, const char * src, const char * idx, char * dst,
        const rows * d, const int64_t * nb1, const int64_t * nb) {
    with_code(bits, block, [&](auto of) {
        typedef decltype(of) code;
        run(n, block/8, [&]() { ggml_cuda_rq_get_rows_kernel<code>(src, idx, dst, n, *d, nb1[0], nb1[1], nb1[2], nb[1], nb[2], nb[3]); });
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

alignas(16) uint4 ggml_cuda_rq_map_shared[1024]; // 2 * 4 rows of 512 values

template <int n>
static void rotate(const ggml_cuda_rq_maps * maps, const ggml_cuda_rq_jobs & jobs) {
    int64_t n_warps = 0;
    for (int i = 0; i < jobs.n; i++) {
        n_warps += ggml_cuda_rq_warps<n>(jobs.job[i].rows);
    }
    if (!maps) {
        run(n_warps, [&]() { ggml_cuda_rq_rotate_kernel<n>(jobs); });
        return;
    }
    dim3 grid = warps(n_warps);
    for (int i = 0; i < maps->n; i++) {
        grid.x += maps->map[i].tiles.z*maps->map[i].heads;
        if (ggml_cuda_rq_map_nb_shared(maps->map[i].n) > (int) sizeof(ggml_cuda_rq_map_shared)) {
            abort();
        }
    }
    emulator::launch(grid, { 32, GGML_CUDA_RQ_WARPS, 1 }, [&]() { ggml_cuda_rq_turn_kernel<n>(*maps, jobs); },
        []() { memset(ggml_cuda_rq_map_shared, 0xFF, sizeof(ggml_cuda_rq_map_shared)); });
}

// maps: products with the matrices of a profile in the same launch, or nullptr
extern "C" void emu_rotate(int n, const ggml_cuda_rq_maps * maps, const ggml_cuda_rq_jobs * jobs) {
    switch (n) {
        case 64:  rotate< 64>(maps, *jobs); break;
        case 128: rotate<128>(maps, *jobs); break;
        default:  rotate<256>(maps, *jobs); break;
    }
}

// ---- what upstream's vector attention kernel asks of a type ----

template <typename code, int D, int nthreads>
static float vec_dot(const char * k, const int32_t * q, const float * q_scale) {
    float sum = 0.0f;
    for (int t = 0; t < nthreads; t++) { // lanes, whose sums the kernel adds up
        int    mine[D/4/nthreads];
        float2 scale[D/4/nthreads];
        for (int i = 0; i < D/4/nthreads; i++) {
            mine[i]  = q[nthreads*i + t];
            scale[i] = make_float2(q_scale[(nthreads*i + t)/8], NAN);
        }
        sum += ggml_cuda_rq_vec_dot<code, D, nthreads>(k, mine, scale, t);
    }
    return sum;
}

template <typename code, int D>
static float vec_dot(int nthreads, const char * k, const int32_t * q, const float * q_scale) {
    switch (nthreads) {
        case 2:  return vec_dot<code, D, 2>(k, q, q_scale);
        case 4:  return vec_dot<code, D, 4>(k, q, q_scale);
        default: return vec_dot<code, D, D < 128 ? D/4 : 32>(k, q, q_scale);
    }
}

// q: head_dim int8, q_scale: of each 32 of them
extern "C" float emu_vec_dot(int bits, int head_dim, int nthreads, const char * k, const int32_t * q, const float * q_scale) {
    float sum = 0.0f;
    if (head_dim == 64) {
        with_code_of<64>(bits, [&](auto of) { sum = vec_dot<decltype(of), 64>(nthreads, k, q, q_scale); });
    } else {
        with_code_of<128>(bits, [&](auto of) {
            typedef decltype(of) code;
            sum = head_dim == 128 ? vec_dot<code, 128>(nthreads, k, q, q_scale) : vec_dot<code, 256>(nthreads, k, q, q_scale);
        });
    }
    return sum;
}

extern "C" void emu_vec_dequantize(int bits, int block, int64_t n, const char * v, float * as_f32, half * as_f16) {
    with_code(bits, block, [&](auto of) {
        typedef decltype(of) code;
        for (int64_t i = 0; i < n; i += 4) {
            ggml_cuda_rq_vec_dequantize<code>(v, i, as_f32 + i);
            ggml_cuda_rq_vec_dequantize<code>(v, i, as_f16 + i);
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

static ggml_cuda_rq_fa_kernel find(int type_k, int dim_k, int dim_v, int type_v) {
    const ggml_type v = (ggml_type) type_v;
    if (type_k == type_v && type_k == GGML_TYPE_Q8_0) {
        return ggml_cuda_rq_fa_find_same<ggml_cuda_rq_kv_q8_0>(dim_k, dim_v);
    }
    if (type_k == type_v && type_k == GGML_TYPE_Q4_0) {
        return ggml_cuda_rq_fa_find_same<ggml_cuda_rq_kv_q4_0>(dim_k, dim_v);
    }
    const bool narrow = dim_k % 128 != 0;
    switch (type_k) {
        case GGML_TYPE_F16:
            return narrow ? ggml_cuda_rq_fa_find_64<ggml_cuda_rq_kv_f16, false>(dim_k, dim_v, v) : ggml_cuda_rq_fa_find<ggml_cuda_rq_kv_f16, false>(dim_k, dim_v, v);
        case GGML_TYPE_Q8_0:
            return narrow ? ggml_cuda_rq_fa_find_64<ggml_cuda_rq_kv_q8_0, false>(dim_k, dim_v, v) : ggml_cuda_rq_fa_find<ggml_cuda_rq_kv_q8_0, false>(dim_k, dim_v, v);
        case GGML_TYPE_PLANAR2: return ggml_cuda_rq_fa_find<ggml_cuda_rq_kv<2>, true>(dim_k, dim_v, v);
        case GGML_TYPE_PLANAR3: return ggml_cuda_rq_fa_find<ggml_cuda_rq_kv<3>, true>(dim_k, dim_v, v);
        case GGML_TYPE_PLANAR4: return ggml_cuda_rq_fa_find<ggml_cuda_rq_kv<4>, true>(dim_k, dim_v, v);
        case GGML_TYPE_RQ2_64:  return ggml_cuda_rq_fa_find_64<ggml_cuda_rq_kv<2, 64>, true>(dim_k, dim_v, v);
        case GGML_TYPE_RQ3_64:  return ggml_cuda_rq_fa_find_64<ggml_cuda_rq_kv<3, 64>, true>(dim_k, dim_v, v);
        case GGML_TYPE_RQ4_64:  return ggml_cuda_rq_fa_find_64<ggml_cuda_rq_kv<4, 64>, true>(dim_k, dim_v, v);
        default:                return {};
    }
}

// D: values of a row, n: that are rotated together
static void combine(int D, int n, const float * parts, const float2 * meta, float * dst, int64_t rows, int n_parts, int family, int mode) {
    const uint3 units = init_fastdiv_values(D/n);
    switch (n) {
        case 64:  run(rows*units.z, 16, [&]() { ggml_cuda_rq_combine_kernel< 64>(parts, meta, dst, rows, units, n_parts, family, mode); }); break;
        case 128: run(rows*units.z,     [&]() { ggml_cuda_rq_combine_kernel<128>(parts, meta, dst, rows, units, n_parts, family, mode); }); break;
        default:  run(rows*units.z,     [&]() { ggml_cuda_rq_combine_kernel<256>(parts, meta, dst, rows, units, n_parts, family, mode); }); break;
    }
}

extern "C" int emu_parts(int64_t tiles, int64_t places, int64_t passes) {
    return ggml_cuda_rq_parts(tiles, places, passes);
}

extern "C" void emu_combine(int D, int n, const float * parts, const float2 * meta, float * dst, int64_t rows, int n_parts, int family, int mode) {
    combine(D, n, parts, meta, dst, rows, n_parts, family, mode);
}

extern "C" void emu_combine_recent(int n, const float * parts, const float2 * meta, float * dst, int64_t rows, int n_parts,
        const ggml_cuda_rq_queries * queries, const ggml_cuda_rq_recent * recent) {
    run(rows, [&]() {
        if (n == 64) {
            ggml_cuda_rq_combine_recent_kernel<64>(parts, meta, dst, rows, n_parts, *queries, *recent);
        } else if (n == 128) {
            ggml_cuda_rq_combine_recent_kernel<128>(parts, meta, dst, rows, n_parts, *queries, *recent);
        } else {
            ggml_cuda_rq_combine_recent_kernel<256>(parts, meta, dst, rows, n_parts, *queries, *recent);
        }
    });
}

// dst: [dim_v, heads, queries, sequences]; recent: null without recent rows, into how many parts they go is left to this
// pass: rows that a CUDA block takes in one, of the cache and recent ones; 0 when there is no such kernel
extern "C" void emu_attention(int head_dim, int dim_v, int type_k, int type_v, const attention * a, const char * q, const char * k, const char * v,
        const char * mask, const char * sinks, const int32_t * kv_max, const ggml_cuda_rq_recent * recent, float * dst, int32_t * pass) {
    const ggml_cuda_rq_fa_kernel kernel = find(type_k, head_dim, dim_v, type_v);
    pass[0] = kernel.rows;
    pass[1] = kernel.rows_recent;
    if (!kernel.kernel) {
        return;
    }
    const ggml_cuda_rq_recent none = {};
    ggml_cuda_rq_recent rows_of = recent ? *recent : none;
    rows_of.parts = (rows_of.n + kernel.rows_recent - 1)/kernel.rows_recent; // as in rq-fattn.cu
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
    std::vector<float>  part(rows*parts*dim_v, NAN);
    std::vector<float2> meta(rows*parts, float2{ NAN, NAN });

    emulator::launch(grid, { 32, GGML_CUDA_RQ_FA_WARPS, 1 }, [&]() {
        kernel.kernel(q, k, v, mask, sinks, kv_max, part.data(), meta.data(),
            a->softcap != 0.0f ? a->scale/a->softcap : a->scale, a->max_bias, m0, m1, n_head_log2, a->softcap,
            head_dim, uint3{ 0, 0, (uint32_t) a->queries }, a->heads, a->sequences, a->nb_q[0], a->nb_q[1], a->nb_q[2],
            head_dim, a->kv, a->heads_kv, a->sequences, a->nb_k[0], a->nb_k[1], a->nb_k3, a->nb_v[0], a->nb_v[1], a->nb_v3,
            a->queries, 1, a->mask_sequences, a->nb_mask, a->nb_mask*a->queries, (int64_t) a->nb_mask*a->queries,
            rows_of);
    }, []() { memset(ggml_cuda_rq_fa_shared, 0xFF, sizeof(ggml_cuda_rq_fa_shared)); });

    combine(dim_v, dim_v % 256 == 0 ? 256 : dim_v % 128 == 0 ? 128 : 64, part.data(), meta.data(), dst, rows, parts, -1, 0);
}

#endif // GGML_USE_HIP
