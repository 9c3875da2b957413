#define GGML_RQ_TABLES_ENCODER
#define GGML_RQ_TABLES_ROTATIONS
#include "ggml-rq.h"

#include "ggml-impl.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(_MSC_VER) && !defined(__clang__)
typedef volatile int rq_atomic_int; // has no stdatomic.h for C
#else
#include <stdatomic.h>
typedef atomic_int rq_atomic_int;
#endif

// The encoder works on integers, so that every compiler and backend produces the same bytes: values are scaled by
// a power of two (exact) and truncated to 15 bits, the sums are exact and therefore independent of their order, and
// the only rounding is the last one, of the scale to fp16. The numpy reference is ggufrq/codec/quant.py.

#define RQ_N GGML_RQ_BLOCK_SIZE // the most values of a block

static_assert(GGML_RQ_BLOCK_SIZE == QK_RQ, "tables and block structs differ");

// a block's number of values and of bits are constants where these are inlined
#if defined(__GNUC__)
#define RQ_INLINE static inline __attribute__((always_inline))
#else
#define RQ_INLINE static inline
#endif

#define RQ_MAX_MID 15 // thresholds of the 5-bit code

#define RQ_BITS_INF 0x7f800000 // magnitudes above this are NaN
#define RQ_BITS_MAX 0x477de040 // 64992.25 = 65504*127/128, the largest magnitude that a block holds
#define RQ_BITS_MIN 0x33800000 // 2^-24: blocks that stay below this become zero

static inline int32_t rq_bits(float f) {
    int32_t u;
    memcpy(&u, &f, sizeof(u));
    return u;
}

static inline float rq_float(int32_t u) {
    float f;
    memcpy(&f, &u, sizeof(f));
    return f;
}

// 2^e for -126 <= e <= 127
static inline float rq_exp2(int e) {
    return rq_float((e + 127) * (1 << 23));
}

struct rq_block {
    int16_t a[RQ_N];   // magnitudes, scaled by 2^(14 - e)
    int16_t neg[RQ_N]; // -1 where the value is negative
    int16_t amax;      // largest a, in [2^14, 2^15)
    int     e;
};

// false if all values are too small for a scale in fp16
RQ_INLINE bool rq_load(const float * GGML_RESTRICT x, struct rq_block * GGML_RESTRICT b, int n) {
    int32_t u[RQ_N]; // bit patterns of the magnitudes: ordered as the magnitudes are
    int32_t umax = 0;

    for (int j = 0; j < n; j++) {
        const int32_t w = rq_bits(x[j]);
        int32_t v = w & 0x7fffffff;
        const int32_t number = -(v <= RQ_BITS_INF); // all ones, or zero for NaN
        v = v < RQ_BITS_MAX ? v : RQ_BITS_MAX;
        v = v & number;
        b->neg[j] = (int16_t) (-(w < 0) & number);
        u[j] = v;
        umax = umax > v ? umax : v;
    }

    if (umax < RQ_BITS_MIN) {
        return false;
    }

    b->e = (umax >> 23) - 127;
    const float scale = rq_exp2(14 - b->e);
    for (int j = 0; j < n; j++) {
        b->a[j] = (int16_t) (int32_t) (rq_float(u[j]) * scale);
    }
    b->amax = (int16_t) (int32_t) (rq_float(umax) * scale);
    return true;
}

// s: scale in units of 2^-11 of a per centroid unit, s < 2^24
// t[k]: magnitudes above it take a centroid beyond the k-th, midpoint = s*(c[k] + c[k+1])/2
static inline void rq_thresholds(uint32_t s, const uint8_t * mid2, int n_mid, int16_t * t) {
    for (int k = 0; k < n_mid; k++) {
        const uint32_t v = (s * mid2[k]) >> 12;
        t[k] = (int16_t) (v < 32767 ? v : 32767);
    }
}

// num/den in units of 2^-11, rounded down; num < 2^30, den < 2^21, so that 32 bits are enough
static inline uint32_t rq_ratio(uint32_t num, uint32_t den) {
    const uint32_t q = num / den;
    const uint32_t r = num - q*den;
    return (q << 11) + (r << 11)/den;
}

// centroid chosen for the magnitude a, and its index above zero; branch-free, for the vectorizer
#define RQ_OVER(a, k, value) (-((a) > t[k]) & (value))

static inline void rq_choose2(const int16_t * GGML_RESTRICT a, const int16_t * t, int16_t * GGML_RESTRICT c, int n) {
    for (int j = 0; j < n; j++) {
        c[j] = (int16_t) (GGML_RQ2_MAG0 + RQ_OVER(a[j], 0, GGML_RQ2_STEP0));
    }
}

static inline void rq_choose3(const int16_t * GGML_RESTRICT a, const int16_t * t, int16_t * GGML_RESTRICT c, int n) {
    for (int j = 0; j < n; j++) {
        c[j] = (int16_t) (GGML_RQ3_MAG0 + RQ_OVER(a[j], 0, GGML_RQ3_STEP0) + RQ_OVER(a[j], 1, GGML_RQ3_STEP1) +
                          RQ_OVER(a[j], 2, GGML_RQ3_STEP2));
    }
}

static inline void rq_choose4(const int16_t * GGML_RESTRICT a, const int16_t * t, int16_t * GGML_RESTRICT c, int n) {
    for (int j = 0; j < n; j++) {
        c[j] = (int16_t) (GGML_RQ4_MAG0 + RQ_OVER(a[j], 0, GGML_RQ4_STEP0) + RQ_OVER(a[j], 1, GGML_RQ4_STEP1) +
                          RQ_OVER(a[j], 2, GGML_RQ4_STEP2) + RQ_OVER(a[j], 3, GGML_RQ4_STEP3) +
                          RQ_OVER(a[j], 4, GGML_RQ4_STEP4) + RQ_OVER(a[j], 5, GGML_RQ4_STEP5) +
                          RQ_OVER(a[j], 6, GGML_RQ4_STEP6));
    }
}

static inline void rq_choose5(const int16_t * GGML_RESTRICT a, const int16_t * t, int16_t * GGML_RESTRICT c, int n) {
    for (int j = 0; j < n; j++) {
        c[j] = (int16_t) (GGML_RQ5_MAG0 + RQ_OVER(a[j], 0, GGML_RQ5_STEP0) + RQ_OVER(a[j], 1, GGML_RQ5_STEP1) +
                           RQ_OVER(a[j], 2, GGML_RQ5_STEP2) + RQ_OVER(a[j], 3, GGML_RQ5_STEP3) +
                           RQ_OVER(a[j], 4, GGML_RQ5_STEP4) + RQ_OVER(a[j], 5, GGML_RQ5_STEP5) +
                           RQ_OVER(a[j], 6, GGML_RQ5_STEP6) + RQ_OVER(a[j], 7, GGML_RQ5_STEP7) +
                           RQ_OVER(a[j], 8, GGML_RQ5_STEP8) + RQ_OVER(a[j], 9, GGML_RQ5_STEP9) +
                           RQ_OVER(a[j], 10, GGML_RQ5_STEP10) + RQ_OVER(a[j], 11, GGML_RQ5_STEP11) +
                           RQ_OVER(a[j], 12, GGML_RQ5_STEP12) + RQ_OVER(a[j], 13, GGML_RQ5_STEP13) +
                           RQ_OVER(a[j], 14, GGML_RQ5_STEP14));
    }
}

static inline void rq_level2(const int16_t * GGML_RESTRICT a, const int16_t * t, int16_t * GGML_RESTRICT l, int n) {
    for (int j = 0; j < n; j++) {
        l[j] = (int16_t) (2 + RQ_OVER(a[j], 0, 1));
    }
}

static inline void rq_level3(const int16_t * GGML_RESTRICT a, const int16_t * t, int16_t * GGML_RESTRICT l, int n) {
    for (int j = 0; j < n; j++) {
        l[j] = (int16_t) (4 + RQ_OVER(a[j], 0, 1) + RQ_OVER(a[j], 1, 1) + RQ_OVER(a[j], 2, 1));
    }
}

static inline void rq_level4(const int16_t * GGML_RESTRICT a, const int16_t * t, int16_t * GGML_RESTRICT l, int n) {
    for (int j = 0; j < n; j++) {
        l[j] = (int16_t) (8 + RQ_OVER(a[j], 0, 1) + RQ_OVER(a[j], 1, 1) + RQ_OVER(a[j], 2, 1) + RQ_OVER(a[j], 3, 1) +
                          RQ_OVER(a[j], 4, 1) + RQ_OVER(a[j], 5, 1) + RQ_OVER(a[j], 6, 1));
    }
}

static inline void rq_level5(const int16_t * GGML_RESTRICT a, const int16_t * t, int16_t * GGML_RESTRICT l, int n) {
    for (int j = 0; j < n; j++) {
        l[j] = (int16_t) (16 + RQ_OVER(a[j], 0, 1) + RQ_OVER(a[j], 1, 1) + RQ_OVER(a[j], 2, 1) + RQ_OVER(a[j], 3, 1) +
                           RQ_OVER(a[j], 4, 1) + RQ_OVER(a[j], 5, 1) + RQ_OVER(a[j], 6, 1) + RQ_OVER(a[j], 7, 1) +
                           RQ_OVER(a[j], 8, 1) + RQ_OVER(a[j], 9, 1) + RQ_OVER(a[j], 10, 1) + RQ_OVER(a[j], 11, 1) +
                           RQ_OVER(a[j], 12, 1) + RQ_OVER(a[j], 13, 1) + RQ_OVER(a[j], 14, 1));
    }
}

// least squares: num/den is the best scale for the centroids c, and takes num^2/den off the squared error
RQ_INLINE void rq_sums(const int16_t * GGML_RESTRICT a, const int16_t * GGML_RESTRICT c, int n, uint32_t * num, uint32_t * den) {
    int32_t sn = 0;
    int32_t sd = 0;
    for (int j = 0; j < n; j++) {
        sn += a[j] * c[j];
        sd += c[j] * c[j];
    }
    *num = (uint32_t) sn;
    *den = (uint32_t) sd;
}

RQ_INLINE int64_t rq_squares(const int16_t * a, int n) {
    int64_t sum = 0;
    for (int j = 0; j < n; j++) {
        sum += (int32_t) a[j] * a[j];
    }
    return sum;
}

// in units of 2^-11: one correctly rounded root and one product, the same everywhere
RQ_INLINE uint32_t rq_norm(const int16_t * a, int n, double factor) {
    return (uint32_t) (sqrt((double) rq_squares(a, n)) * factor);
}

typedef void (*rq_choose_t)(const int16_t * GGML_RESTRICT a, const int16_t * t, int16_t * GGML_RESTRICT c, int n);

// least-squares scale: three starts between a clipped and a full range (the error has several local minima), the best
// of them refined once
RQ_INLINE uint32_t rq_least_squares(const struct rq_block * b, int n, const uint8_t * mid2, int n_mid, const uint8_t * starts, rq_choose_t choose) {
    int16_t  t[RQ_MAX_MID];
    int16_t  c[RQ_N];
    uint32_t num;
    uint32_t den;
    uint32_t s = 0;
    uint64_t best = 0;
    for (int i = 0; i < 3; i++) {
        rq_thresholds(((uint32_t) b->amax * starts[i]) >> 3, mid2, n_mid, t);
        choose(b->a, t, c, n);
        rq_sums(b->a, c, n, &num, &den);
        const uint32_t r    = rq_ratio(num, den);
        const uint64_t gain = (uint64_t) r * num;
        s    = gain > best ? r    : s;
        best = gain > best ? gain : best;
    }

    rq_thresholds(s, mid2, n_mid, t);
    choose(b->a, t, c, n);
    rq_sums(b->a, c, n, &num, &den);
    return rq_ratio(num, den);
}

// the scale of the centroids c with which the inner product of the block with what is decoded from it is that with itself
RQ_INLINE uint32_t rq_inner(const int16_t * GGML_RESTRICT a, const int16_t * GGML_RESTRICT c, int n) {
    uint32_t num;
    uint32_t den;
    rq_sums(a, c, n, &num, &den);
    return num > 0 ? (uint32_t) (((uint64_t) rq_squares(a, n) << 11) / num) : 0;
}

static ggml_half rq_stored(uint32_t s, int e) {
    const float d = (float) s * rq_exp2(e - 18); // exact: s has at most 24 bits
    return GGML_FP32_TO_FP16(d < 65504.0f ? d : 65504.0f);
}

// choose scale and indices of one block, the indices for the least-squares scale (or that of the norm) as fp16; false if the scale is zero in fp16
RQ_INLINE bool rq_encode(const float * GGML_RESTRICT x, ggml_half * d, uint8_t * GGML_RESTRICT idx, int n, int bits,
        const uint8_t * mid2, const uint8_t * starts, double norm, rq_choose_t choose, rq_choose_t level) {
    const int n_mid = (1 << (bits - 1)) - 1;
    struct rq_block b;
    if (!rq_load(x, &b, n)) {
        return false;
    }

    int16_t  t[RQ_MAX_MID];
    int16_t  c[RQ_N];
    const enum ggml_rq_scale kind = ggml_rq_scale_kind();
    uint32_t s = kind == GGML_RQ_SCALE_NORM ? rq_norm(b.a, n, norm) : rq_least_squares(&b, n, mid2, n_mid, starts, choose);

    *d = rq_stored(s, b.e);
    s  = (uint32_t) (GGML_FP16_TO_FP32(*d) * rq_exp2(18 - b.e));
    if (s == 0) {
        return false;
    }

    rq_thresholds(s, mid2, n_mid, t);
    if (kind == GGML_RQ_SCALE_INNER) {
        choose(b.a, t, c, n);
        *d = rq_stored(rq_inner(b.a, c, n), b.e);
        if (*d == 0) {
            return false;
        }
    }
    level(b.a, t, c, n);
    for (int j = 0; j < n; j++) {
        idx[j] = (uint8_t) ((c[j] ^ b.neg[j]) & ((1 << bits) - 1)); // the complement for negative values
    }
    return true;
}

// bits of an index in qs; an odd number of bits has one more in qh
#define RQ_LOW(bits) ((bits) < 4 ? 2 : 4)

RQ_INLINE void rq_pack(const uint8_t * GGML_RESTRICT idx, uint8_t * GGML_RESTRICT q, int n, int bits) {
    const int low = RQ_LOW(bits);
    for (int j = 0; low == 4 && j < n/2; j++) {
        q[j] = (uint8_t) ((idx[j] & 15) | idx[j + n/2] << 4);
    }
    for (int j = 0; low == 2 && j < n/4; j++) {
        q[j] = (uint8_t) ((idx[j] & 3) | (idx[j + n/4] & 3) << 2 | (idx[j + n/2] & 3) << 4 | (idx[j + 3*n/4] & 3) << 6);
    }
    for (int j = 0; bits > low && j < n/8; j++) {
        uint8_t v = 0;
        for (int b = 0; b < 8; b++) {
            v |= (uint8_t) ((idx[j + b*(n/8)] >> low) << b);
        }
        q[n*low/8 + j] = v;
    }
}

// k values in blocks of n, each two bytes of scale and the indices
RQ_INLINE void rq_quantize_row(const float * GGML_RESTRICT x, void * GGML_RESTRICT vy, int64_t k, int n, int bits,
        const uint8_t * mid2, const uint8_t * starts, double norm, rq_choose_t choose, rq_choose_t level) {
    assert(k % n == 0);
    const size_t size = sizeof(ggml_half) + (size_t) (n*bits/8);
    uint8_t * y = (uint8_t *) vy;
    uint8_t idx[RQ_N];
    for (int64_t i = 0; i < k/n; i++, x += n, y += size) {
        ggml_half d;
        if (rq_encode(x, &d, idx, n, bits, mid2, starts, norm, choose, level)) {
            memcpy(y, &d, sizeof(d));
            rq_pack(idx, y + sizeof(d), n, bits);
        } else {
            memset(y, 0, size);
        }
    }
}

#define RQ_QUANTIZE_ROW(CODE, N, BITS) \
    void quantize_row_rq##CODE##_ref(const float * GGML_RESTRICT x, block_rq##CODE * GGML_RESTRICT y, int64_t k) { \
        rq_quantize_row(x, y, k, N, BITS, ggml_rq##BITS##_mid2, ggml_rq##BITS##_starts, GGML_RQ##CODE##_NORM, rq_choose##BITS, rq_level##BITS); \
    }

RQ_QUANTIZE_ROW(2, QK_RQ, 2)
RQ_QUANTIZE_ROW(3, QK_RQ, 3)
RQ_QUANTIZE_ROW(4, QK_RQ, 4)
RQ_QUANTIZE_ROW(5, QK_RQ, 5)

RQ_QUANTIZE_ROW(2_64, QK_RQ_64, 2)
RQ_QUANTIZE_ROW(3_64, QK_RQ_64, 3)
RQ_QUANTIZE_ROW(4_64, QK_RQ_64, 4)
RQ_QUANTIZE_ROW(5_64, QK_RQ_64, 5)

#ifndef GGML_RQ_NATIVE // see ggml-cpu/rq-native.c

static const char * const rq_scale_names[] = { "inner", "lsq", "norm" };

const char * ggml_rq_scale_name(enum ggml_rq_scale scale) {
    return rq_scale_names[scale];
}

bool ggml_rq_scale_from_name(const char * name, enum ggml_rq_scale * scale) {
    for (int i = GGML_RQ_SCALE_INNER; i <= GGML_RQ_SCALE_NORM; i++) {
        if (!name || !*name || strcmp(name, rq_scale_names[i]) == 0) {
            *scale = (enum ggml_rq_scale) i;
            return true;
        }
    }
    return false;
}

enum ggml_rq_scale ggml_rq_scale_kind(void) {
    static rq_atomic_int kind = -1; // threads that come here first together find the same
    int found = kind;
    if (found < 0) {
        enum ggml_rq_scale scale = GGML_RQ_SCALE_INNER;
        ggml_rq_scale_from_name(getenv("LLAMA_RQ_SCALE"), &scale);
        kind = found = (int) scale;
    }
    return (enum ggml_rq_scale) found;
}

RQ_INLINE void rq_unpack(const uint8_t * GGML_RESTRICT q, int8_t * GGML_RESTRICT idx, int n, int bits) {
    const int low = RQ_LOW(bits);
    for (int j = 0; low == 4 && j < n/2; j++) {
        idx[j]       = (int8_t) (q[j] & 15);
        idx[j + n/2] = (int8_t) (q[j] >> 4);
    }
    for (int j = 0; low == 2 && j < n/4; j++) {
        idx[j]         = (int8_t) ( q[j]       & 3);
        idx[j + n/4]   = (int8_t) ((q[j] >> 2) & 3);
        idx[j + n/2]   = (int8_t) ((q[j] >> 4) & 3);
        idx[j + 3*n/4] = (int8_t) ((q[j] >> 6) & 3);
    }
    for (int b = 0; bits > low && b < 8; b++) {
        for (int j = 0; j < n/8; j++) {
            idx[j + b*(n/8)] = (int8_t) (idx[j + b*(n/8)] | ((q[n*low/8 + j] >> b) & 1) << low);
        }
    }
}

// centroids by comparison instead of a table where there are few: the vectorizer has no byte shuffle
#define RQ_BEYOND(i, k, step) (-((i) > (k)) & (step))

RQ_INLINE void rq_centroids(const uint8_t * GGML_RESTRICT q, int8_t * GGML_RESTRICT c, int n, int bits) {
    if (bits == 4) {
        for (int j = 0; j < n/2; j++) {
            c[j]       = ggml_rq4_centroids[q[j] & 15];
            c[j + n/2] = ggml_rq4_centroids[q[j] >> 4];
        }
        return;
    }
    rq_unpack(q, c, n, bits);
    for (int j = 0; bits == 5 && j < n; j++) {
        c[j] = ggml_rq5_centroids[c[j]];
    }
    for (int j = 0; bits == 2 && j < n; j++) {
        const int8_t s = (int8_t) -(c[j] < 2);
        const int8_t m = (int8_t) ((c[j] ^ s) & 3);
        c[j] = (int8_t) (((GGML_RQ2_MAG0 + RQ_BEYOND(m, 2, GGML_RQ2_STEP0)) ^ s) - s);
    }
    for (int j = 0; bits == 3 && j < n; j++) {
        const int8_t s = (int8_t) -(c[j] < 4);
        const int8_t m = (int8_t) ((c[j] ^ s) & 7);
        c[j] = (int8_t) (((GGML_RQ3_MAG0 + RQ_BEYOND(m, 4, GGML_RQ3_STEP0) + RQ_BEYOND(m, 5, GGML_RQ3_STEP1) +
                           RQ_BEYOND(m, 6, GGML_RQ3_STEP2)) ^ s) - s);
    }
}

// d/128 is exact, and so is its product with a centroid: 11 + 7 bits
RQ_INLINE void rq_dequantize_row(const void * GGML_RESTRICT vx, float * GGML_RESTRICT y, int64_t k, int n, int bits) {
    assert(k % n == 0);
    const uint8_t * x = (const uint8_t *) vx;
    int8_t c[RQ_N];
    for (int64_t i = 0; i < k/n; i++, x += sizeof(ggml_half) + (size_t) (n*bits/8), y += n) {
        ggml_half d;
        memcpy(&d, x, sizeof(d));
        const float step = GGML_FP16_TO_FP32(d) * (1.0f/128.0f);
        rq_centroids(x + sizeof(d), c, n, bits);
        for (int j = 0; j < n; j++) {
            y[j] = step * (float) c[j];
        }
    }
}

#define RQ_DEQUANTIZE_ROW(CODE, N, BITS) \
    void dequantize_row_rq##CODE(const block_rq##CODE * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) { \
        rq_dequantize_row(x, y, k, N, BITS); \
    }

RQ_DEQUANTIZE_ROW(2, QK_RQ, 2)
RQ_DEQUANTIZE_ROW(3, QK_RQ, 3)
RQ_DEQUANTIZE_ROW(4, QK_RQ, 4)
RQ_DEQUANTIZE_ROW(5, QK_RQ, 5)

RQ_DEQUANTIZE_ROW(2_64, QK_RQ_64, 2)
RQ_DEQUANTIZE_ROW(3_64, QK_RQ_64, 3)
RQ_DEQUANTIZE_ROW(4_64, QK_RQ_64, 4)
RQ_DEQUANTIZE_ROW(5_64, QK_RQ_64, 5)

#endif // GGML_RQ_NATIVE

// rotations

static bool rq_valid(int family, int mode, int64_t n) {
    return family >= GGML_RQ_PLANAR && family <= GGML_RQ_ROTOR && mode >= GGML_RQ_NONE && mode <= GGML_RQ_FULL &&
           (n == RQ_N/2 || n == RQ_N || n == 2*RQ_N);
}

// values that B repeats after
static int rq_period(int64_t n) {
    return n < RQ_N ? (int) n : RQ_N;
}

#ifndef GGML_RQ_NATIVE

// width of the block of B that holds row r, its first row in *first and row r of the block in row[]
static int rq_block_row(int family, int n, int r, int * first, float row[4]) {
    const int period = rq_period(n);
    const int i = r % period;
    const int o = r - i;
    switch (family) {
        case GGML_RQ_PLANAR: {
            const float * cs = ggml_rq_planar + 2*(i/2);
            *first = o + (i & ~1);
            row[0] = cs[i & 1];
            row[1] = i & 1 ? -cs[0] : cs[1];
            return 2;
        }
        case GGML_RQ_ISO:
            *first = o + (i & ~3);
            memcpy(row, ggml_rq_iso + 4*i, 4*sizeof(float));
            return 4;
        default:
            if (i >= period/3*3) {
                *first = o + i;
                row[0] = 1.0f;
                return 1;
            }
            *first = o + i - i % 3;
            memcpy(row, ggml_rq_rotor + 3*i, 3*sizeof(float));
            return 3;
    }
}

// sign of the Walsh-Hadamard matrix in natural order
static double rq_hadamard_sign(int i, int j) {
    int v = i & j;
    v ^= v >> 4;
    v ^= v >> 2;
    v ^= v >> 1;
    return v & 1 ? -1.0 : 1.0;
}

// element (i, j) in double: products of two floats are exact there, so that contraction to FMA changes nothing
static float rq_element(int family, int mode, int n, int i, int j) {
    const double norm = 1.0/sqrt((double) n);
    if (mode == GGML_RQ_NONE) {
        return i == j ? 1.0f : 0.0f;
    }
    if (mode == GGML_RQ_HADAMARD) {
        return (float) (rq_hadamard_sign(i, j)*norm);
    }
    float bi[4];
    float bj[4];
    int   i0;
    int   j0;
    const int ni = rq_block_row(family, n, i, &i0, bi);
    if (mode == GGML_RQ_BLOCK) {
        return j >= i0 && j < i0 + ni ? bi[j - i0] : 0.0f;
    }
    const int nj = rq_block_row(family, n, j, &j0, bj);
    double sum = 0.0;
    for (int p = 0; p < ni; p++) {
        for (int q = 0; q < nj; q++) {
            const double v = (double) bi[p] * (double) bj[q];
            sum += rq_hadamard_sign(i0 + p, j0 + q) * v;
        }
    }
    return (float) (sum*norm);
}

bool ggml_rq_rotation_matrix(int family, int mode, int64_t n, float * dst) {
    if (!rq_valid(family, mode, n)) {
        return false;
    }
    // on and above the diagonal, mirrored: symmetric to the last bit
    for (int i = 0; i < n; i++) {
        for (int j = i; j < n; j++) {
            const float v = rq_element(family, mode, (int) n, i, j);
            dst[i*n + j] = v;
            dst[j*n + i] = v;
        }
    }
    return true;
}

#endif // GGML_RQ_NATIVE

RQ_INLINE void rq_apply_blocks(int family, float * v, int n) {
    switch (family) {
        case GGML_RQ_PLANAR:
            for (int i = 0; i < n; i += 2) {
                const float * cs = ggml_rq_planar + i;
                const float a = v[i];
                const float b = v[i + 1];
                v[i]     = cs[0]*a + cs[1]*b;
                v[i + 1] = cs[1]*a - cs[0]*b;
            }
            break;
        case GGML_RQ_ISO:
            for (int i = 0; i < n; i += 4) {
                const float * m = ggml_rq_iso + 4*i;
                const float x[4] = { v[i], v[i + 1], v[i + 2], v[i + 3] };
                for (int r = 0; r < 4; r++) {
                    v[i + r] = m[4*r]*x[0] + m[4*r + 1]*x[1] + m[4*r + 2]*x[2] + m[4*r + 3]*x[3];
                }
            }
            break;
        default:
            for (int i = 0; i < n/3*3; i += 3) {
                const float * m = ggml_rq_rotor + 3*i;
                const float x[3] = { v[i], v[i + 1], v[i + 2] };
                for (int r = 0; r < 3; r++) {
                    v[i + r] = m[3*r]*x[0] + m[3*r + 1]*x[1] + m[3*r + 2]*x[2];
                }
            }
            break;
    }
}

static void rq_apply_hadamard(float * v, int n) {
    for (int h = 1; h < n; h *= 2) {
        for (int i = 0; i < n; i += 2*h) {
            for (int j = i; j < i + h; j++) {
                const float a = v[j];
                const float b = v[j + h];
                v[j]     = a + b;
                v[j + h] = a - b;
            }
        }
    }
    const float norm = (float) (1.0/sqrt((double) n));
    for (int i = 0; i < n; i++) {
        v[i] *= norm;
    }
}

bool ggml_rq_rotate_row(int family, int mode, const float * x, float * y, int64_t n) {
    if (!rq_valid(family, mode, n)) {
        return false;
    }
    float v[2*RQ_N];
    memcpy(v, x, (size_t) n*sizeof(float));
    for (int pass = 0; pass < 2; pass++) {
        if (mode == GGML_RQ_FULL || (mode == GGML_RQ_BLOCK && pass == 0)) {
            if (n < RQ_N) {
                rq_apply_blocks(family, v, RQ_N/2);
            }
            for (int64_t o = 0; o + RQ_N <= n; o += RQ_N) {
                rq_apply_blocks(family, v + o, RQ_N);
            }
        }
        if (pass == 0 && (mode == GGML_RQ_FULL || mode == GGML_RQ_HADAMARD)) {
            rq_apply_hadamard(v, (int) n);
        }
    }
    memcpy(y, v, (size_t) n*sizeof(float));
    return true;
}
