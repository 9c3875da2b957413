// stand-in for llama.cpp's fattn-common.cuh
#pragma once

#include "common.cuh"

typedef void (* fattn_kernel_t)(
        const char *, const char *, const char *, const char *, const char *, const int *, float *, float2 *,
        float, float, float, float, uint32_t, float, int32_t, uint3, int32_t, int32_t, int32_t, int32_t, int32_t,
        int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, int64_t, int32_t, int32_t, int64_t,
        int32_t, int32_t, int32_t, int32_t, int32_t, int64_t);

// of ALiBi, as in ggml_compute_forward_flash_attn_ext
static inline float get_alibi_slope(float max_bias, uint32_t h, uint32_t n_head_log2, float m0, float m1) {
    return max_bias <= 0.0f ? 1.0f : h < n_head_log2 ? powf(m0, (float) (h + 1)) : powf(m1, (float) (2*(h - n_head_log2) + 1));
}
