#pragma once

// Attention of one or two queries on cards without int8 tensor cores (AMD, NVIDIA before Turing): upstream's vector kernel,
// with our types as its K or V.

#include "fattn-vec.cuh"
#include "rq-recent.cuh"
#include "rq-vec.cuh"

typedef void (* ggml_cuda_rq_fa_vec_t)(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// Upstream's kernel asks these two for the functions of a type. The kernels know codes, not families: planar stands for all.

template <typename code, int D, int nthreads>
static __device__ __forceinline__ float ggml_cuda_rq_vec_dot_KQ(
        const char * __restrict__ K, const void * __restrict__, const int * __restrict__ Q_q8, const void * __restrict__ Q_ds) {
    return ggml_cuda_rq_vec_dot<code, D, nthreads>(K, Q_q8, (const float2 *) Q_ds, threadIdx.x % nthreads);
}

template <typename code, typename T>
static __device__ __forceinline__ void ggml_cuda_rq_dequantize_V(const void * __restrict__ V, void * __restrict__ dst, const int64_t i0) {
    ggml_cuda_rq_vec_dequantize<code>(V, i0, (T *) dst);
}

#define GGML_CUDA_RQ_VEC_DOT(type, code, D, nthreads) \
    template <> constexpr __device__ vec_dot_KQ_t get_vec_dot_KQ<type, D, nthreads>() { \
        return ggml_cuda_rq_vec_dot_KQ<code, D, nthreads>; \
    }

#define GGML_CUDA_RQ_VEC_V(type, code) \
    template <> constexpr __device__ dequantize_V_t get_dequantize_V<type, half,  4>() { return ggml_cuda_rq_dequantize_V<code, half>;  } \
    template <> constexpr __device__ dequantize_V_t get_dequantize_V<type, float, 4>() { return ggml_cuda_rq_dequantize_V<code, float>; }

#define GGML_CUDA_RQ_VEC(type, code) \
    GGML_CUDA_RQ_VEC_DOT(type, code, 128, 2) GGML_CUDA_RQ_VEC_DOT(type, code, 128, 4) GGML_CUDA_RQ_VEC_DOT(type, code, 128, 32) \
    GGML_CUDA_RQ_VEC_DOT(type, code, 256, 2) GGML_CUDA_RQ_VEC_DOT(type, code, 256, 4) GGML_CUDA_RQ_VEC_DOT(type, code, 256, 32) \
    GGML_CUDA_RQ_VEC_V(type, code)

#define GGML_CUDA_RQ_VEC_64(type, code) \
    GGML_CUDA_RQ_VEC_DOT(type, code, 64, 2) GGML_CUDA_RQ_VEC_DOT(type, code, 64, 4) GGML_CUDA_RQ_VEC_DOT(type, code, 64, 16) \
    GGML_CUDA_RQ_VEC_V(type, code)

GGML_CUDA_RQ_VEC(GGML_TYPE_PLANAR2, ggml_cuda_rq_code<2>)
GGML_CUDA_RQ_VEC(GGML_TYPE_PLANAR3, ggml_cuda_rq_code<3>)
GGML_CUDA_RQ_VEC(GGML_TYPE_PLANAR4, ggml_cuda_rq_code<4>)

typedef ggml_cuda_rq_code<2, QK_RQ_64> ggml_cuda_rq_code2_64;
typedef ggml_cuda_rq_code<3, QK_RQ_64> ggml_cuda_rq_code3_64;
typedef ggml_cuda_rq_code<4, QK_RQ_64> ggml_cuda_rq_code4_64;

GGML_CUDA_RQ_VEC_64(GGML_TYPE_RQ2_64, ggml_cuda_rq_code2_64)
GGML_CUDA_RQ_VEC_64(GGML_TYPE_RQ3_64, ggml_cuda_rq_code3_64)
GGML_CUDA_RQ_VEC_64(GGML_TYPE_RQ4_64, ggml_cuda_rq_code4_64)

// whether this build has cards that need these kernels
static constexpr bool ggml_cuda_rq_has_arch_below(const int) {
    return false;
}

template <typename... Archs>
static constexpr bool ggml_cuda_rq_has_arch_below(const int arch, const int first, Archs... rest) {
    return first < arch || ggml_cuda_rq_has_arch_below(arch, rest...);
}

#ifdef __CUDA_ARCH_LIST__
static constexpr bool ggml_cuda_rq_fa_vec_needed = ggml_cuda_rq_has_arch_below(GGML_CUDA_CC_TURING, __CUDA_ARCH_LIST__);
#else
static constexpr bool ggml_cuda_rq_fa_vec_needed = true;
#endif // __CUDA_ARCH_LIST__

template <int D, ggml_type type_k, ggml_type type_v, bool softcap>
static void ggml_cuda_rq_fa_vec_recent(ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    if (dst->src[0]->ne[1] == 1) {
        ggml_cuda_rq_fa_vec_recent(ctx, dst, flash_attn_ext_vec<D, 1, type_k, type_v, softcap>, 1);
    } else {
        ggml_cuda_rq_fa_vec_recent(ctx, dst, flash_attn_ext_vec<D, 2, type_k, type_v, softcap>, 2);
    }
}

template <int D, ggml_type type_k, ggml_type type_v>
static void ggml_cuda_rq_fa_vec_case(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (!ggml_rq_has_recent(dst)) {
        ggml_cuda_flash_attn_ext_vec_case<D, type_k, type_v>(ctx, dst);
    } else if (ggml_get_op_params_f32(dst, 2) == 0.0f) {
        ggml_cuda_rq_fa_vec_recent<D, type_k, type_v, false>(ctx, dst);
    } else {
        ggml_cuda_rq_fa_vec_recent<D, type_k, type_v, true>(ctx, dst);
    }
}

template <int D, ggml_type type_k>
static ggml_cuda_rq_fa_vec_t ggml_cuda_rq_fa_vec_find_v(const ggml_type type_v) {
    if constexpr (ggml_cuda_rq_fa_vec_needed) {
        constexpr bool wide = D % QK_RQ == 0;
        if (ggml_rq_is_type(type_v) && ggml_rq_is_sibling(type_v) != wide) {
            switch (ggml_rq_type_bits(type_v)) {
                case 2:  return ggml_cuda_rq_fa_vec_case<D, type_k, wide ? GGML_TYPE_PLANAR2 : GGML_TYPE_RQ2_64>;
                case 3:  return ggml_cuda_rq_fa_vec_case<D, type_k, wide ? GGML_TYPE_PLANAR3 : GGML_TYPE_RQ3_64>;
                case 4:  return ggml_cuda_rq_fa_vec_case<D, type_k, wide ? GGML_TYPE_PLANAR4 : GGML_TYPE_RQ4_64>;
                default: return nullptr;
            }
        }
        if constexpr (type_k != GGML_TYPE_F16 && type_k != GGML_TYPE_Q8_0) {
            switch (type_v) {
                case GGML_TYPE_F16:  return ggml_cuda_rq_fa_vec_case<D, type_k, GGML_TYPE_F16>;
                case GGML_TYPE_Q8_0: return ggml_cuda_rq_fa_vec_case<D, type_k, GGML_TYPE_Q8_0>;
                default:             break;
            }
        }
    }
    return nullptr;
}

// nullptr where there is no such kernel, or no card of this build needs it; heads of 128 and 256, and those of 64
template <ggml_type type_k>
static ggml_cuda_rq_fa_vec_t ggml_cuda_rq_fa_vec_find(const int64_t head_dim, const ggml_type type_v) {
    switch (head_dim) {
        case 128: return ggml_cuda_rq_fa_vec_find_v<128, type_k>(type_v);
        case 256: return ggml_cuda_rq_fa_vec_find_v<256, type_k>(type_v);
        default:  return nullptr;
    }
}

template <ggml_type type_k>
static ggml_cuda_rq_fa_vec_t ggml_cuda_rq_fa_vec_find_64(const int64_t head_dim, const ggml_type type_v) {
    return head_dim == 64 ? ggml_cuda_rq_fa_vec_find_v<64, type_k>(type_v) : nullptr;
}

typedef ggml_cuda_rq_fa_vec_t ggml_cuda_rq_fa_vec_find_t(int64_t head_dim, ggml_type type_v);

ggml_cuda_rq_fa_vec_find_t ggml_cuda_rq_fa_vec_find_rq2;
ggml_cuda_rq_fa_vec_find_t ggml_cuda_rq_fa_vec_find_rq3;
ggml_cuda_rq_fa_vec_find_t ggml_cuda_rq_fa_vec_find_rq4;
ggml_cuda_rq_fa_vec_find_t ggml_cuda_rq_fa_vec_find_rq2_64;
ggml_cuda_rq_fa_vec_find_t ggml_cuda_rq_fa_vec_find_rq3_64;
ggml_cuda_rq_fa_vec_find_t ggml_cuda_rq_fa_vec_find_rq4_64;
ggml_cuda_rq_fa_vec_find_t ggml_cuda_rq_fa_vec_find_f16;
ggml_cuda_rq_fa_vec_find_t ggml_cuda_rq_fa_vec_find_q8_0;
