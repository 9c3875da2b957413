// stand-in for llama.cpp's common.cuh: what our kernels use of it
#pragma once

#include "../emulator.h"

#include "ggml-common.h"
#include "ggml.h"

#define GGML_RQ_HOST
#define FLASH_ATTN_AVAILABLE
#define TURING_MMA_AVAILABLE
#define WARP_SIZE 32
#define NO_DEVICE_CODE abort()
#define CUDA_SET_SHARED_MEMORY_LIMIT(kernel, nbytes) ((void) (nbytes))

template <typename... T> static inline void ggml_cuda_unused(const T &...) {}
#define GGML_UNUSED_VARS(...) ggml_cuda_unused(__VA_ARGS__)

static inline void ggml_cuda_pdl_sync() {}
static inline void ggml_cuda_pdl_lc() {}

static inline void ggml_cuda_syncwarp() {
    bool all[32];
    emulator::meet_warp(true, all);
}

template <typename T>
static inline T warp_reduce_sum(T v) {
    T all[32];
    emulator::meet_warp(v, all);
    T sum = 0;
    for (T one : all) {
        sum += one;
    }
    return sum;
}

static inline float warp_reduce_max(float v) {
    float all[32];
    emulator::meet_warp(v, all);
    for (float one : all) {
        v = fmaxf(v, one);
    }
    return v;
}

static inline uint3 init_fastdiv_values(uint64_t d) {
    return { 0, 0, (uint32_t) d };
}

static inline uint2 fast_div_modulo(uint32_t n, uint3 d) {
    return { n/d.z, n % d.z };
}

static inline int ggml_cuda_dp4a(int a, int b, int c) {
    for (int i = 0; i < 32; i += 8) {
        c += (int8_t) (a >> i)*(int8_t) (b >> i);
    }
    return c;
}

template <int n>
static inline void ggml_cuda_memcpy_1(void * dst, const void * src) {
    if (((uintptr_t) dst | (uintptr_t) src) % n != 0) {
        abort(); // misaligned on a GPU
    }
    memcpy(dst, src, n);
}

// of ALiBi, as in ggml_compute_forward_flash_attn_ext
static inline float get_alibi_slope(float max_bias, uint32_t h, uint32_t n_head_log2, float m0, float m1) {
    return max_bias <= 0.0f ? 1.0f : h < n_head_log2 ? powf(m0, (float) (h + 1)) : powf(m1, (float) (2*(h - n_head_log2) + 1));
}
