// stand-in for the conversions of ggml-impl.h, written for plainness: scale of a block, never negative or NaN
#pragma once

#include "ggml.h"

#include <math.h>

static inline float shim_fp16_to_fp32(uint16_t h) {
    const int e = h >> 10;
    const int m = h & 0x3ff;
    return e == 0 ? ldexpf((float) m, -24) : ldexpf((float) (m + 1024), e - 25);
}

// round to nearest, ties to even, by integers: f = m * 2^(e - 24) with m < 2^24
static inline uint16_t shim_fp32_to_fp16(float f) {
    int e;
    const int32_t m = (int32_t) ldexpf(frexpf(f, &e), 24);
    if (m == 0 || e < -25) {
        return 0;
    }
    const int drop = e >= -13 ? 13 : -e; // bits below the last one of the fp16 mantissa, more for subnormals
    const int32_t half = 1 << (drop - 1);
    int32_t q = m >> drop;
    const int32_t rest = m & ((1 << drop) - 1);
    q += rest > half || (rest == half && (q & 1));
    return (uint16_t) (e >= -13 ? q + ((e + 13) << 10) : q);
}

#define GGML_FP16_TO_FP32(x) shim_fp16_to_fp32(x)
#define GGML_FP32_TO_FP16(x) shim_fp32_to_fp16(x)
