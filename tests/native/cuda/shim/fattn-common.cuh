// stand-in for llama.cpp's fattn-common.cuh
#pragma once

#include "common.cuh"

typedef void (* fattn_kernel_t)(
        const char *, const char *, const char *, const char *, const char *, const int *, float *, float2 *,
        float, float, float, float, uint32_t, float, int32_t, uint3, int32_t, int32_t, int32_t, int32_t, int32_t,
        int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, int64_t, int32_t, int32_t, int64_t,
        int32_t, int32_t, int32_t, int32_t, int32_t, int64_t);
