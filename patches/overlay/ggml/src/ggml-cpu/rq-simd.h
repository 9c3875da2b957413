#pragma once

// The few vector operations that the kernels of the rq codes need, for AVX-512 VNNI, AVX2, NEON and plain C++.
// A vector is RQ_W lanes of 32 bits, or 4*RQ_W bytes.

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"
#include "vec.h"

#include <cstdint>
#include <cstring>

static inline int32_t rq_load32(const void * p) {
    int32_t v;
    memcpy(&v, p, sizeof(v));
    return v;
}

// Operations, the same for each kind:
//   rq_dot_w(acc, w, c)   acc[l] += sum of four w*c, 0 <= w <= 127, |c| <= 127
//   rq_dot_k(acc, k, q)   the same with k = c + RQ_K_BIAS and |q| <= 127
//   rq_rows(p, stride)    four dwords of each of RQ_W rows; 128-bit lane L of the i-th result: row 4*L + i
//   rq_lookup(t, i)       bytes of a table of 16, or of 32: rq_table(p), rq_table32(p)
//   rq_transpose(v)       in each 128-bit lane: rows of dwords to columns
//   rq_interleave(r, out) 16 bytes of four rows: out bytes 4*j + i = byte j of row i
//   rq_upper_bytes(out)   of these, bytes 8 to 15 of the rows come first; where a vector has 16 bytes of a row, it gets them
//                         twice, shifted right by one bit the second time
//   rq_fma(y, acc, x, s)  y[l] += acc[l]*x[l]*s
//   rq_fma2(y, h, l, s)   y[l] += (128*h[l] + l[l])*s
//   rq_max(x, n)          the largest of n floats, a multiple of 16, with no promise for NaN

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)

#define RQ_W      16
#define RQ_K_BIAS 128
#define RQ_RN_K   4
#define RQ_RM_V   4

typedef __m512i rq_vec;

static inline rq_vec rq_zero() { return _mm512_setzero_si512(); }
static inline rq_vec rq_set32(int32_t v) { return _mm512_set1_epi32(v); }
static inline rq_vec rq_set8(int v) { return _mm512_set1_epi8((char) v); }
static inline rq_vec rq_load(const void * p) { return _mm512_loadu_si512(p); }
static inline void   rq_store(void * p, rq_vec v) { _mm512_storeu_si512(p, v); }
static inline rq_vec rq_and(rq_vec a, rq_vec b) { return _mm512_and_si512(a, b); }
static inline rq_vec rq_or(rq_vec a, rq_vec b) { return _mm512_or_si512(a, b); }
template <int n> static inline rq_vec rq_shr(rq_vec a) { return _mm512_srli_epi16(a, n); }
template <int n> static inline rq_vec rq_shl(rq_vec a) { return _mm512_slli_epi16(a, n); }
static inline rq_vec rq_table(const int8_t * t) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) t)); }
static inline rq_vec rq_lookup(rq_vec table, rq_vec i) { return _mm512_shuffle_epi8(table, i); }

#if defined(__AVX512VBMI__)
struct rq_table32 {
    rq_vec t;
    explicit rq_table32(const int8_t * p) { t = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) p)); }
};
static inline rq_vec rq_lookup(const rq_table32 & table, rq_vec i) { return _mm512_permutexvar_epi8(i, table.t); }
#else
struct rq_table32 {
    rq_vec low;
    rq_vec high;
    explicit rq_table32(const int8_t * p) { low = rq_table(p); high = rq_table(p + 16); }
};
static inline rq_vec rq_lookup(const rq_table32 & table, rq_vec i) {
    const __mmask64 high = _mm512_test_epi8_mask(i, rq_set8(16));
    return _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(table.low, i), high, table.high, i);
}
#endif

static inline rq_vec rq_dot_w(rq_vec acc, rq_vec w, rq_vec c) { return _mm512_dpbusd_epi32(acc, w, c); }
static inline rq_vec rq_dot_k(rq_vec acc, rq_vec k, rq_vec q) { return _mm512_dpbusd_epi32(acc, k, q); }

static inline __m128i rq_load128(const uint8_t * p) { return _mm_loadu_si128((const __m128i *) p); }

static inline rq_vec rq_lanes(const uint8_t * p0, const uint8_t * p1, const uint8_t * p2, const uint8_t * p3) {
    __m512i v = _mm512_castsi128_si512(rq_load128(p0));
    v = _mm512_inserti32x4(v, rq_load128(p1), 1);
    v = _mm512_inserti32x4(v, rq_load128(p2), 2);
    return _mm512_inserti32x4(v, rq_load128(p3), 3);
}

static inline void rq_rows(const uint8_t * p, size_t stride, rq_vec v[4]) {
    for (int i = 0; i < 4; ++i, p += stride) {
        v[i] = rq_lanes(p, p + 4*stride, p + 8*stride, p + 12*stride);
    }
}

static inline void rq_transpose(rq_vec v[4]) {
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]);
    const __m512i b = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]);
    const __m512i d = _mm512_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm512_unpacklo_epi64(a, c);
    v[1] = _mm512_unpackhi_epi64(a, c);
    v[2] = _mm512_unpacklo_epi64(b, d);
    v[3] = _mm512_unpackhi_epi64(b, d);
}

static inline void rq_interleave(const uint8_t * const r[4], size_t offset, rq_vec * out) {
    const __m512i dwords = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes  = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i v = rq_lanes(r[0] + offset, r[1] + offset, r[2] + offset, r[3] + offset);
    out[0] = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(dwords, v), bytes);
}

static inline void rq_upper_bytes(rq_vec * out) {
    const __m512i v = _mm512_shuffle_i64x2(out[0], out[0], 0xee);
    out[0] = _mm512_mask_srli_epi16(v, 0xffff0000, v, 1);
}

static inline void rq_fma(float * y, rq_vec acc, const float * x, float s) {
    const __m512 f = _mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(s));
    _mm512_storeu_ps(y, _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), f, _mm512_loadu_ps(y)));
}

static inline void rq_fma2(float * y, rq_vec h, rq_vec l, float s) {
    const __m512 f = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(h, 7), l));
    _mm512_storeu_ps(y, _mm512_fmadd_ps(f, _mm512_set1_ps(s), _mm512_loadu_ps(y)));
}

static inline float rq_max(const float * x, int n) {
    __m512 m = _mm512_loadu_ps(x);
    for (int i = 16; i < n; i += 16) {
        m = _mm512_max_ps(m, _mm512_loadu_ps(x + i));
    }
    return _mm512_reduce_max_ps(m);
}

#elif defined(__AVX2__)

#define RQ_W    8
#define RQ_RN_K 2
#define RQ_RM_V 2

typedef __m256i rq_vec;

static inline rq_vec rq_zero() { return _mm256_setzero_si256(); }
static inline rq_vec rq_set32(int32_t v) { return _mm256_set1_epi32(v); }
static inline rq_vec rq_set8(int v) { return _mm256_set1_epi8((char) v); }
static inline rq_vec rq_load(const void * p) { return _mm256_loadu_si256((const __m256i *) p); }
static inline void   rq_store(void * p, rq_vec v) { _mm256_storeu_si256((__m256i *) p, v); }
static inline rq_vec rq_and(rq_vec a, rq_vec b) { return _mm256_and_si256(a, b); }
static inline rq_vec rq_or(rq_vec a, rq_vec b) { return _mm256_or_si256(a, b); }
template <int n> static inline rq_vec rq_shr(rq_vec a) { return _mm256_srli_epi16(a, n); }
template <int n> static inline rq_vec rq_shl(rq_vec a) { return _mm256_slli_epi16(a, n); }
static inline rq_vec rq_table(const int8_t * t) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) t)); }
static inline rq_vec rq_lookup(rq_vec table, rq_vec i) { return _mm256_shuffle_epi8(table, i); }

struct rq_table32 {
    rq_vec low;
    rq_vec high;
    explicit rq_table32(const int8_t * p) { low = rq_table(p); high = rq_table(p + 16); }
};
static inline rq_vec rq_lookup(const rq_table32 & table, rq_vec i) { // the highest bit of a byte chooses: 16 << 3
    return _mm256_blendv_epi8(_mm256_shuffle_epi8(table.low, i), _mm256_shuffle_epi8(table.high, i), _mm256_slli_epi16(i, 3));
}

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define RQ_K_BIAS 128
static inline rq_vec rq_dot_w(rq_vec acc, rq_vec w, rq_vec c) { return _mm256_dpbusd_epi32(acc, w, c); }
static inline rq_vec rq_dot_k(rq_vec acc, rq_vec k, rq_vec q) { return _mm256_dpbusd_epi32(acc, k, q); }
#elif defined(__AVXVNNI__)
#define RQ_K_BIAS 128
static inline rq_vec rq_dot_w(rq_vec acc, rq_vec w, rq_vec c) { return _mm256_dpbusd_avx_epi32(acc, w, c); }
static inline rq_vec rq_dot_k(rq_vec acc, rq_vec k, rq_vec q) { return _mm256_dpbusd_avx_epi32(acc, k, q); }
#else
#define RQ_K_BIAS 0
static inline rq_vec rq_dot_w(rq_vec acc, rq_vec w, rq_vec c) { // two products fit an int16: 2*127*127
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, c), _mm256_set1_epi16(1)));
}
static inline rq_vec rq_dot_k(rq_vec acc, rq_vec k, rq_vec q) {
    return rq_dot_w(acc, _mm256_abs_epi8(k), _mm256_sign_epi8(q, k));
}
#endif

static inline rq_vec rq_lanes(const uint8_t * p0, const uint8_t * p1) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) p0)),
            _mm_loadu_si128((const __m128i *) p1), 1);
}

static inline void rq_rows(const uint8_t * p, size_t stride, rq_vec v[4]) {
    for (int i = 0; i < 4; ++i, p += stride) {
        v[i] = rq_lanes(p, p + 4*stride);
    }
}

static inline void rq_transpose(rq_vec v[4]) {
    const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]);
    const __m256i b = _mm256_unpackhi_epi32(v[0], v[1]);
    const __m256i c = _mm256_unpacklo_epi32(v[2], v[3]);
    const __m256i d = _mm256_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm256_unpacklo_epi64(a, c);
    v[1] = _mm256_unpackhi_epi64(a, c);
    v[2] = _mm256_unpacklo_epi64(b, d);
    v[3] = _mm256_unpackhi_epi64(b, d);
}

static inline void rq_interleave(const uint8_t * const r[4], size_t offset, rq_vec * out) {
    const __m256i dwords = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes  = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    const __m256i a = rq_lanes(r[0] + offset, r[2] + offset);
    const __m256i b = rq_lanes(r[1] + offset, r[3] + offset);
    // words of rows 0 and 1 in the low lane, of rows 2 and 3 in the high one; then dwords side by side, then words
    out[0] = _mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(_mm256_unpacklo_epi8(a, b), dwords), bytes);
    out[1] = _mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(_mm256_unpackhi_epi8(a, b), dwords), bytes);
}

static inline void rq_upper_bytes(rq_vec * out) {
    out[0] = out[1];
}

static inline void rq_fma(float * y, rq_vec acc, const float * x, float s) {
    const __m256 f = _mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(s));
    _mm256_storeu_ps(y, _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(acc), f), _mm256_loadu_ps(y)));
}

static inline void rq_fma2(float * y, rq_vec h, rq_vec l, float s) {
    const __m256 f = _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32(h, 7), l));
    _mm256_storeu_ps(y, _mm256_add_ps(_mm256_mul_ps(f, _mm256_set1_ps(s)), _mm256_loadu_ps(y)));
}

static inline float rq_max(const float * x, int n) {
    __m256 m = _mm256_loadu_ps(x);
    for (int i = 8; i < n; i += 8) {
        m = _mm256_max_ps(m, _mm256_loadu_ps(x + i));
    }
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}

#elif defined(__ARM_NEON) && (defined(__aarch64__) || defined(_M_ARM64))

#define RQ_W      4
#define RQ_K_BIAS 0
#define RQ_RN_K   4
#define RQ_RM_V   4

typedef uint8x16_t rq_vec;

static inline rq_vec rq_from32(int32x4_t v) { return vreinterpretq_u8_s32(v); }
static inline int32x4_t rq_to32(rq_vec v) { return vreinterpretq_s32_u8(v); }
static inline rq_vec rq_zero() { return vdupq_n_u8(0); }
static inline rq_vec rq_set32(int32_t v) { return rq_from32(vdupq_n_s32(v)); }
static inline rq_vec rq_set8(int v) { return vdupq_n_u8((uint8_t) v); }
static inline rq_vec rq_load(const void * p) { return vld1q_u8((const uint8_t *) p); }
static inline void   rq_store(void * p, rq_vec v) { vst1q_u8((uint8_t *) p, v); }
static inline rq_vec rq_and(rq_vec a, rq_vec b) { return vandq_u8(a, b); }
static inline rq_vec rq_or(rq_vec a, rq_vec b) { return vorrq_u8(a, b); }
template <int n> static inline rq_vec rq_shr(rq_vec a) { return n == 0 ? a : vshrq_n_u8(a, n == 0 ? 1 : n); }
template <int n> static inline rq_vec rq_shl(rq_vec a) { return vshlq_n_u8(a, n); }
static inline rq_vec rq_table(const int8_t * t) { return vld1q_u8((const uint8_t *) t); }
static inline rq_vec rq_lookup(rq_vec table, rq_vec i) { return vqtbl1q_u8(table, i); }

struct rq_table32 {
    uint8x16x2_t t;
    explicit rq_table32(const int8_t * p) { t.val[0] = rq_table(p); t.val[1] = rq_table(p + 16); }
};
static inline rq_vec rq_lookup(const rq_table32 & table, rq_vec i) { return vqtbl2q_u8(table.t, i); }

static inline rq_vec rq_dot_w(rq_vec acc, rq_vec w, rq_vec c) {
    const int8x16_t a = vreinterpretq_s8_u8(w);
    const int8x16_t b = vreinterpretq_s8_u8(c);
#if defined(__ARM_FEATURE_DOTPROD)
    return rq_from32(vdotq_s32(rq_to32(acc), a, b));
#else
    const int32x4_t lo = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
    const int32x4_t hi = vpaddlq_s16(vmull_s8(vget_high_s8(a), vget_high_s8(b)));
    return rq_from32(vaddq_s32(rq_to32(acc), vpaddq_s32(lo, hi)));
#endif
}
static inline rq_vec rq_dot_k(rq_vec acc, rq_vec k, rq_vec q) { return rq_dot_w(acc, q, k); }

static inline void rq_rows(const uint8_t * p, size_t stride, rq_vec v[4]) {
    for (int i = 0; i < 4; ++i) {
        v[i] = vld1q_u8(p + i*stride);
    }
}

static inline void rq_transpose(rq_vec v[4]) {
    const int64x2_t a = vreinterpretq_s64_s32(vzip1q_s32(rq_to32(v[0]), rq_to32(v[1])));
    const int64x2_t b = vreinterpretq_s64_s32(vzip2q_s32(rq_to32(v[0]), rq_to32(v[1])));
    const int64x2_t c = vreinterpretq_s64_s32(vzip1q_s32(rq_to32(v[2]), rq_to32(v[3])));
    const int64x2_t d = vreinterpretq_s64_s32(vzip2q_s32(rq_to32(v[2]), rq_to32(v[3])));
    v[0] = vreinterpretq_u8_s64(vzip1q_s64(a, c));
    v[1] = vreinterpretq_u8_s64(vzip2q_s64(a, c));
    v[2] = vreinterpretq_u8_s64(vzip1q_s64(b, d));
    v[3] = vreinterpretq_u8_s64(vzip2q_s64(b, d));
}

static inline void rq_interleave(const uint8_t * const r[4], size_t offset, rq_vec * out) {
    const uint8x16_t r0 = vld1q_u8(r[0] + offset);
    const uint8x16_t r1 = vld1q_u8(r[1] + offset);
    const uint8x16_t r2 = vld1q_u8(r[2] + offset);
    const uint8x16_t r3 = vld1q_u8(r[3] + offset);
    const uint16x8_t a = vreinterpretq_u16_u8(vzip1q_u8(r0, r1));
    const uint16x8_t b = vreinterpretq_u16_u8(vzip2q_u8(r0, r1));
    const uint16x8_t c = vreinterpretq_u16_u8(vzip1q_u8(r2, r3));
    const uint16x8_t d = vreinterpretq_u16_u8(vzip2q_u8(r2, r3));
    out[0] = vreinterpretq_u8_u16(vzip1q_u16(a, c));
    out[1] = vreinterpretq_u8_u16(vzip2q_u16(a, c));
    out[2] = vreinterpretq_u8_u16(vzip1q_u16(b, d));
    out[3] = vreinterpretq_u8_u16(vzip2q_u16(b, d));
}

static inline void rq_upper_bytes(rq_vec * out) {
    out[0] = out[2];
    out[1] = out[3];
}

static inline void rq_fma(float * y, rq_vec acc, const float * x, float s) {
    const float32x4_t f = vmulq_n_f32(vld1q_f32(x), s);
    vst1q_f32(y, vfmaq_f32(vld1q_f32(y), vcvtq_f32_s32(rq_to32(acc)), f));
}

static inline void rq_fma2(float * y, rq_vec h, rq_vec l, float s) {
    const float32x4_t f = vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(rq_to32(h), 7), rq_to32(l)));
    vst1q_f32(y, vfmaq_n_f32(vld1q_f32(y), f, s));
}

static inline float rq_max(const float * x, int n) {
    float32x4_t m = vld1q_f32(x);
    for (int i = 4; i < n; i += 4) {
        m = vmaxnmq_f32(m, vld1q_f32(x + i));
    }
    return vmaxnmvq_f32(m);
}

#else

#define RQ_W      4
#define RQ_K_BIAS 0
#define RQ_RN_K   2
#define RQ_RM_V   2

struct rq_vec {
    uint8_t b[16];
};

template <typename F>
static inline rq_vec rq_bytes(F f) {
    rq_vec v;
    for (int i = 0; i < 16; ++i) {
        v.b[i] = (uint8_t) f(i);
    }
    return v;
}

static inline int32_t rq_lane(rq_vec v, int l) { return rq_load32(v.b + 4*l); }
static inline rq_vec rq_set8(int v) { return rq_bytes([=](int) { return v; }); }
static inline rq_vec rq_zero() { return rq_set8(0); }
static inline rq_vec rq_load(const void * p) { rq_vec v; memcpy(v.b, p, 16); return v; }
static inline void   rq_store(void * p, rq_vec v) { memcpy(p, v.b, 16); }
static inline rq_vec rq_and(rq_vec x, rq_vec y) { return rq_bytes([=](int i) { return x.b[i] & y.b[i]; }); }
static inline rq_vec rq_or(rq_vec x, rq_vec y) { return rq_bytes([=](int i) { return x.b[i] | y.b[i]; }); }
template <int n> static inline rq_vec rq_shr(rq_vec x) { return rq_bytes([=](int i) { return x.b[i] >> n; }); }
template <int n> static inline rq_vec rq_shl(rq_vec x) { return rq_bytes([=](int i) { return x.b[i] << n; }); }
static inline rq_vec rq_table(const int8_t * t) { return rq_load(t); }
static inline rq_vec rq_lookup(rq_vec t, rq_vec x) { return rq_bytes([=](int i) { return t.b[x.b[i]]; }); }

struct rq_table32 {
    uint8_t b[32];
    explicit rq_table32(const int8_t * p) { memcpy(b, p, sizeof(b)); }
};
static inline rq_vec rq_lookup(const rq_table32 & t, rq_vec x) { return rq_bytes([&](int i) { return t.b[x.b[i]]; }); }

static inline rq_vec rq_set32(int32_t x) {
    rq_vec v;
    for (int l = 0; l < 4; ++l) {
        memcpy(v.b + 4*l, &x, 4);
    }
    return v;
}

static inline rq_vec rq_dot_w(rq_vec acc, rq_vec w, rq_vec c) {
    rq_vec v;
    for (int l = 0; l < 4; ++l) {
        int32_t sum = rq_lane(acc, l);
        for (int i = 4*l; i < 4*l + 4; ++i) {
            sum += (int8_t) w.b[i] * (int8_t) c.b[i];
        }
        memcpy(v.b + 4*l, &sum, 4);
    }
    return v;
}
static inline rq_vec rq_dot_k(rq_vec acc, rq_vec k, rq_vec q) { return rq_dot_w(acc, q, k); }

static inline void rq_rows(const uint8_t * p, size_t stride, rq_vec v[4]) {
    for (int i = 0; i < 4; ++i) {
        v[i] = rq_load(p + i*stride);
    }
}

static inline void rq_transpose(rq_vec v[4]) {
    const rq_vec r[4] = { v[0], v[1], v[2], v[3] };
    for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) {
            memcpy(v[j].b + 4*i, r[i].b + 4*j, 4);
        }
    }
}

static inline void rq_interleave(const uint8_t * const r[4], size_t offset, rq_vec * out) {
    for (int j = 0; j < 16; ++j) {
        for (int i = 0; i < 4; ++i) {
            out[j/4].b[4*(j % 4) + i] = r[i][offset + j];
        }
    }
}

static inline void rq_upper_bytes(rq_vec * out) {
    out[0] = out[2];
    out[1] = out[3];
}

static inline void rq_fma(float * y, rq_vec acc, const float * x, float s) {
    for (int l = 0; l < 4; ++l) {
        y[l] += rq_lane(acc, l)*x[l]*s;
    }
}

static inline void rq_fma2(float * y, rq_vec h, rq_vec l, float s) {
    for (int i = 0; i < 4; ++i) {
        y[i] += (128*rq_lane(h, i) + rq_lane(l, i))*s;
    }
}

static inline float rq_max(const float * x, int n) {
    float m = x[0];
    for (int i = 1; i < n; ++i) {
        m = m > x[i] ? m : x[i];
    }
    return m;
}

#endif

// n floats, a multiple of 16, become exp(x - max); returns their sum. Upstream's sums up every vector of 16 by itself.
static inline float rq_exp(float * x, int n, float max) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) {
        const __m512 e = ggml_v_expf(_mm512_sub_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(max)));
        _mm512_storeu_ps(x + i, e);
        sum = _mm512_add_ps(sum, e);
    }
    return _mm512_reduce_add_ps(sum);
#else
    return (float) ggml_vec_soft_max_f32(n, x, x, max);
#endif
}
