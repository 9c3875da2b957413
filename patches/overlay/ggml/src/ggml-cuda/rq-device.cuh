#pragma once

// Codes and rotations of the rq cache types on a GPU: what a warp or a lane does with one block or row. The encoder and
// the rotations give the bits of ggml-rq.c; tests/cuda compiles this file as C++ and holds it to that.

#include "common.cuh"

// constant expressions on the device, and the same numbers as everywhere
#undef  GGML_TABLE_BEGIN
#undef  GGML_TABLE_END
#define GGML_TABLE_BEGIN(type, name, size) static constexpr __device__ type name[size] = {
#define GGML_TABLE_END() };
#define GGML_RQ_TABLES_ENCODER
#define GGML_RQ_TABLES_ROTATIONS
#include "ggml-rq-types.h"

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA) && !defined(GGML_RQ_HOST)
#define GGML_CUDA_RQ_PTX
#endif // !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA) && !defined(GGML_RQ_HOST)

// the bytes of a (0..3) and b (4..7) that the low four nibbles of sel name; bit 3 of a nibble must be zero
static __device__ __forceinline__ uint32_t ggml_cuda_rq_prmt(const uint32_t a, const uint32_t b, const uint32_t sel) {
#ifdef GGML_CUDA_RQ_PTX
    uint32_t ret; // __byte_perm would mask the selector first
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(ret) : "r"(a), "r"(b), "r"(sel));
    return ret;
#elif defined(GGML_USE_HIP)
    uint32_t bytes = sel & 0xFFFF; // v_perm_b32 takes a byte for each; HIP's __byte_perm indexes arrays, on CDNA in memory
    bytes = (bytes | bytes << 8) & 0x00FF00FF;
    bytes = (bytes | bytes << 4) & 0x0F0F0F0F;
    return __builtin_amdgcn_perm(b, a, bytes);
#else
    return __byte_perm(a, b, sel);
#endif // GGML_CUDA_RQ_PTX
}

// bits of a where mask is set, of b elsewhere
static __device__ __forceinline__ uint32_t ggml_cuda_rq_select(const uint32_t a, const uint32_t b, const uint32_t mask) {
#ifdef GGML_CUDA_RQ_PTX
    uint32_t ret; // left to itself the compiler makes two instructions of it
    asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(ret) : "r"(a), "r"(b), "r"(mask));
    return ret;
#else
    return (a & mask) | (b & ~mask);
#endif // GGML_CUDA_RQ_PTX
}

// four entries of a table of int8 from i on
static constexpr __host__ __device__ uint32_t ggml_cuda_rq_pack(const int8_t * table, const int i) {
    return (uint32_t) (uint8_t) table[i] | (uint32_t) (uint8_t) table[i + 1] << 8 |
        (uint32_t) (uint8_t) table[i + 2] << 16 | (uint32_t) (uint8_t) table[i + 3] << 24;
}

// ---- the three codes ----
//
// A block of N = 128 values, or of 64 in the siblings, is read as N/8 words of eight nibbles: in word w, nibble 2*k is the
// index of value 4*w + k, nibble 2*k + 1 that of value 4*w + k + N/2. words() makes words w and w + N/16 of what L (a loader of
// 32-bit words of the block by byte offset, shifted right by so many bits) returns, word() any one; lookup() turns the four lower
// (k = 0) or upper (k = 1) nibbles of a word into centroids. Its zero may be one that the compiler can't know to be 0: then it
// keeps the table in registers instead of fetching it again before each use.

template <int bits, int N = QK_RQ> struct ggml_cuda_rq_code;

template <int N> struct ggml_cuda_rq_code<2, N> {
    typedef std::conditional_t<N == QK_RQ, block_rq2, block_rq2_64> block;
    static constexpr int    bits   = 2;
    static constexpr int    values = N;
    static constexpr int    n_mid  = 1;
    static constexpr double norm   = N == QK_RQ ? GGML_RQ2_NORM : GGML_RQ2_64_NORM;

    static constexpr __device__ int mag0()       { return GGML_RQ2_MAG0; }
    static constexpr __device__ int step(int)    { return GGML_RQ2_STEP0; }
    static constexpr __device__ int mid2(int k)  { return ggml_rq2_mid2[k]; }
    static constexpr __device__ int start(int i) { return ggml_rq2_starts[i]; }

    template <typename L>
    static __device__ __forceinline__ void words(const L & load, const int w, uint32_t (&n)[2]) {
        const uint32_t q = load(offsetof(block, qs) + 4*w);
        n[0] =  q       & 0x33333333;
        n[1] = (q >> 2) & 0x33333333;
    }

    template <typename L>
    static __device__ __forceinline__ uint32_t word(const L & load, const int w) {
        return load(offsetof(block, qs) + 4*(w & (N/16 - 1)), (w >> (N == 128 ? 3 : 2))*2) & 0x33333333;
    }

    static __device__ __forceinline__ uint32_t lookup(const uint32_t n, const int k, const uint32_t zero = 0) {
        constexpr uint32_t t = ggml_cuda_rq_pack(ggml_rq2_centroids, 0);
        return ggml_cuda_rq_prmt(t + zero, t + zero, n >> 16*k);
    }
};

template <int N> struct ggml_cuda_rq_code<3, N> {
    typedef std::conditional_t<N == QK_RQ, block_rq3, block_rq3_64> block;
    static constexpr int    bits   = 3;
    static constexpr int    values = N;
    static constexpr int    n_mid  = 3;
    static constexpr double norm   = N == QK_RQ ? GGML_RQ3_NORM : GGML_RQ3_64_NORM;

    static constexpr __device__ int mag0()       { return GGML_RQ3_MAG0; }
    static constexpr __device__ int step(int k)  { return k == 0 ? GGML_RQ3_STEP0 : k == 1 ? GGML_RQ3_STEP1 : GGML_RQ3_STEP2; }
    static constexpr __device__ int mid2(int k)  { return ggml_rq3_mid2[k]; }
    static constexpr __device__ int start(int i) { return ggml_rq3_starts[i]; }

    template <typename L>
    static __device__ __forceinline__ void words(const L & load, const int w, uint32_t (&n)[2]) {
        const uint32_t q = load(offsetof(block, qs) + 4*w);
        // bit 2*s of a byte belongs to bits 2*s of q; selected, since a plain & would be made anew for h << 2
        const uint32_t h = ggml_cuda_rq_select(load(offsetof(block, qh) + 4*(w & (N/32 - 1)), w >> (N == 128 ? 2 : 1)), 0, 0x55555555);
        n[0] = ggml_cuda_rq_select(q,      h << 2, 0x33333333);
        n[1] = ggml_cuda_rq_select(q >> 2, h,      0x33333333);
    }

    template <typename L>
    static __device__ __forceinline__ uint32_t word(const L & load, const int w) {
        const uint32_t q = load(offsetof(block, qs) + 4*(w & (N/16 - 1)), (w >> (N == 128 ? 3 : 2))*2);
        const uint32_t h = load(offsetof(block, qh) + 4*(w & (N/32 - 1)), w >> (N == 128 ? 2 : 1)) & 0x55555555;
        return ggml_cuda_rq_select(q, h << 2, 0x33333333);
    }

    static __device__ __forceinline__ uint32_t lookup(const uint32_t n, const int k, const uint32_t zero = 0) {
        constexpr uint32_t t0 = ggml_cuda_rq_pack(ggml_rq3_centroids, 0);
        constexpr uint32_t t1 = ggml_cuda_rq_pack(ggml_rq3_centroids, 4);
        return ggml_cuda_rq_prmt(t0 + zero, t1, n >> 16*k);
    }
};

template <int N> struct ggml_cuda_rq_code<4, N> {
    typedef std::conditional_t<N == QK_RQ, block_rq4, block_rq4_64> block;
    static constexpr int    bits   = 4;
    static constexpr int    values = N;
    static constexpr int    n_mid  = 7;
    static constexpr double norm   = N == QK_RQ ? GGML_RQ4_NORM : GGML_RQ4_64_NORM;

    static constexpr __device__ int mag0()      { return GGML_RQ4_MAG0; }
    static constexpr __device__ int step(int k) {
        return k == 0 ? GGML_RQ4_STEP0 : k == 1 ? GGML_RQ4_STEP1 : k == 2 ? GGML_RQ4_STEP2 : k == 3 ? GGML_RQ4_STEP3 :
            k == 4 ? GGML_RQ4_STEP4 : k == 5 ? GGML_RQ4_STEP5 : GGML_RQ4_STEP6;
    }
    static constexpr __device__ int mid2(int k)  { return ggml_rq4_mid2[k]; }
    static constexpr __device__ int start(int i) { return ggml_rq4_starts[i]; }

    template <typename L>
    static __device__ __forceinline__ void words(const L & load, const int w, uint32_t (&n)[2]) {
        n[0] = load(offsetof(block, qs) + 4*w);
        n[1] = load(offsetof(block, qs) + 4*w + N/4);
    }

    template <typename L>
    static __device__ __forceinline__ uint32_t word(const L & load, const int w) {
        return load(offsetof(block, qs) + 4*w);
    }

    static __device__ __forceinline__ uint32_t lookup(const uint32_t n, const int k, const uint32_t zero = 0) {
        constexpr uint32_t t0 = ggml_cuda_rq_pack(ggml_rq4_centroids,  0);
        constexpr uint32_t t1 = ggml_cuda_rq_pack(ggml_rq4_centroids,  4);
        constexpr uint32_t t2 = ggml_cuda_rq_pack(ggml_rq4_centroids,  8);
        constexpr uint32_t t3 = ggml_cuda_rq_pack(ggml_rq4_centroids, 12);
        const uint32_t low  = (n & 0x77777777) >> 16*k;
        const uint32_t high = ggml_cuda_rq_select(n >> 1, 0x32103210 + zero, 0x44444444) >> 16*k; // of the two found by low
        return ggml_cuda_rq_prmt(ggml_cuda_rq_prmt(t0 + zero, t1, low), ggml_cuda_rq_prmt(t2 + zero, t3, low), high);
    }
};

// loads words of a block in global memory, where it is aligned to two bytes
struct ggml_cuda_rq_load_global {
    const void * block;

    __device__ __forceinline__ uint32_t operator()(const int offset, const int shift = 0) const {
        const uint16_t * p = (const uint16_t *) ((const char *) block + offset);
        return ((uint32_t) p[0] | (uint32_t) p[1] << 16) >> shift;
    }
};

// the four centroids of values 4*w + k (k = 0..3) of a block of n, as int8, and those of values n/2 behind; w < n/8
template <typename code>
static __device__ __forceinline__ void ggml_cuda_rq_centroids(const typename code::block * x, const int w, int & lo, int & hi) {
    uint32_t n[2];
    code::words(ggml_cuda_rq_load_global{x}, w & (code::values/16 - 1), n);
    const uint32_t word = w < code::values/16 ? n[0] : n[1];
    const uint32_t c01  = code::lookup(word, 0);
    const uint32_t c23  = code::lookup(word, 1);
    lo = (int) ggml_cuda_rq_prmt(c01, c23, 0x6420);
    hi = (int) ggml_cuda_rq_prmt(c01, c23, 0x7531);
}

// their values; d: the scale over 128
static __device__ __forceinline__ void ggml_cuda_rq_values(const int centroids, const float d, float (&v)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        v[k] = d * (float) (int8_t) (centroids >> 8*k);
    }
}

// the values of a block that centroids() tells
template <typename code>
static __device__ __forceinline__ void ggml_cuda_rq_decode(const typename code::block * x, const int w, float (&lo)[4], float (&hi)[4]) {
    int c[2];
    ggml_cuda_rq_centroids<code>(x, w, c[0], c[1]);

    const float d = __half2float(x->d) * (1.0f/128.0f); // exact, as the products are
    ggml_cuda_rq_values(c[0], d, lo);
    ggml_cuda_rq_values(c[1], d, hi);
}

static __device__ __forceinline__ void ggml_cuda_rq_write4(float * dst, const float (&v)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        dst[k] = v[k];
    }
}

static __device__ __forceinline__ void ggml_cuda_rq_write4(half * dst, const float (&v)[4]) {
    ((half2 *) dst)[0] = make_half2(__float2half_rn(v[0]), __float2half_rn(v[1]));
    ((half2 *) dst)[1] = make_half2(__float2half_rn(v[2]), __float2half_rn(v[3]));
}

// ---- the encoder, by a warp of which each lane holds four values: those of one block, or of two with 64 ----

#define GGML_CUDA_RQ_BITS_INF 0x7f800000
#define GGML_CUDA_RQ_BITS_MAX 0x477de040 // 64992.25
#define GGML_CUDA_RQ_BITS_MIN 0x33800000 // 2^-24

// lanes: that hold a block
template <int lanes>
static __device__ __forceinline__ int ggml_cuda_rq_max(int x) {
#pragma unroll
    for (int offset = lanes/2; offset > 0; offset >>= 1) {
        x = max(x, __shfl_xor_sync(0xFFFFFFFF, x, offset, WARP_SIZE));
    }
    return x;
}

template <int lanes>
static __device__ __forceinline__ uint32_t ggml_cuda_rq_sum(int x) {
    if constexpr (lanes == WARP_SIZE) {
        return (uint32_t) warp_reduce_sum(x);
    } else {
#pragma unroll
        for (int offset = lanes/2; offset > 0; offset >>= 1) {
            x += __shfl_xor_sync(0xFFFFFFFF, x, offset, WARP_SIZE);
        }
        return (uint32_t) x;
    }
}

// 2^e for -126 <= e <= 127
static __device__ __forceinline__ float ggml_cuda_rq_exp2(const int e) {
    return __int_as_float((e + 127) * (1 << 23));
}

template <typename code>
static __device__ __forceinline__ void ggml_cuda_rq_thresholds(const uint32_t s, int (&t)[code::n_mid]) {
#pragma unroll
    for (int k = 0; k < code::n_mid; ++k) {
        t[k] = (int) min((s * (uint32_t) code::mid2(k)) >> 12, 32767u);
    }
}

// magnitude of the centroid that is chosen for a
template <typename code>
static __device__ __forceinline__ int ggml_cuda_rq_choose(const int a, const int (&t)[code::n_mid]) {
    int c = code::mag0();
#pragma unroll
    for (int k = 0; k < code::n_mid; ++k) {
        c += a > t[k] ? code::step(k) : 0;
    }
    return c;
}

template <typename code>
static __device__ __forceinline__ void ggml_cuda_rq_sums(const int (&a)[4], const int (&t)[code::n_mid], uint32_t & num, uint32_t & den) {
    int sn = 0;
    int sd = 0;
#pragma unroll
    for (int s = 0; s < 4; ++s) {
        const int c = ggml_cuda_rq_choose<code>(a[s], t);
        sn += a[s] * c;
        sd += c * c;
    }
    num = ggml_cuda_rq_sum<code::values/4>(sn);
    den = ggml_cuda_rq_sum<code::values/4>(sd);
}

template <int lanes>
static __device__ __forceinline__ uint64_t ggml_cuda_rq_squares(const int (&a)[4]) {
    uint32_t sum = 0; // each square is below 2^30
#pragma unroll
    for (int s = 0; s < 4; ++s) {
        sum += (uint32_t) (a[s] * a[s]);
    }
    const uint32_t low  = ggml_cuda_rq_sum<lanes>((int) (sum & 0xFFFF));
    const uint32_t high = ggml_cuda_rq_sum<lanes>((int) (sum >> 16));
    return ((uint64_t) high << 16) + low;
}

static __device__ __forceinline__ uint32_t ggml_cuda_rq_ratio(const uint32_t num, const uint32_t den) {
    const uint32_t q = num / den;
    const uint32_t r = num - q*den;
    return (q << 11) + (r << 11)/den;
}

static __device__ __forceinline__ half ggml_cuda_rq_stored(const uint32_t s, const int e) {
    return __float2half_rn(fminf((float) s * ggml_cuda_rq_exp2(e - 18), 65504.0f));
}

// idx[s]: index of x[s]. Returns the scale, zero for a block that is stored as zeros; no lane leaves before the end, since the
// block of the other half of the warp may be another.
template <typename code>
static __device__ __forceinline__ half ggml_cuda_rq_encode(const float (&x)[4], const int scale_kind, uint32_t (&idx)[4]) {
    int a[4];
    int neg[4];
    int umax = 0;
#pragma unroll
    for (int s = 0; s < 4; ++s) {
        const int  w      = __float_as_int(x[s]);
        const bool number = (w & 0x7fffffff) <= GGML_CUDA_RQ_BITS_INF;
        a[s]   = number ? min(w & 0x7fffffff, GGML_CUDA_RQ_BITS_MAX) : 0;
        neg[s] = number && w < 0 ? -1 : 0;
        umax   = max(umax, a[s]);
    }
    umax = ggml_cuda_rq_max<code::values/4>(umax);
    bool zero = umax < GGML_CUDA_RQ_BITS_MIN;
    umax = max(umax, GGML_CUDA_RQ_BITS_MIN);

    const int   e     = (umax >> 23) - 127;
    const float scale = ggml_cuda_rq_exp2(14 - e);
    const int   amax  = (int) (__int_as_float(umax) * scale);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
        a[s] = (int) (__int_as_float(a[s]) * scale);
    }

    int      t[code::n_mid];
    uint32_t num;
    uint32_t den;
    uint32_t s = 0;
    if (scale_kind == GGML_RQ_SCALE_NORM) {
        s = (uint32_t) (sqrt((double) ggml_cuda_rq_squares<code::values/4>(a)) * code::norm);
    } else {
        uint64_t best = 0;
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            ggml_cuda_rq_thresholds<code>(((uint32_t) amax * code::start(i)) >> 3, t);
            ggml_cuda_rq_sums<code>(a, t, num, den);
            const uint32_t r    = ggml_cuda_rq_ratio(num, den);
            const uint64_t gain = (uint64_t) r * num;
            s    = gain > best ? r    : s;
            best = gain > best ? gain : best;
        }
        ggml_cuda_rq_thresholds<code>(s, t);
        ggml_cuda_rq_sums<code>(a, t, num, den);
        s = ggml_cuda_rq_ratio(num, den);
    }

    half d = ggml_cuda_rq_stored(s, e);
    s = (uint32_t) (__half2float(d) * ggml_cuda_rq_exp2(18 - e));
    zero = zero || s == 0;

    ggml_cuda_rq_thresholds<code>(s, t);
    if (scale_kind == GGML_RQ_SCALE_INNER) {
        ggml_cuda_rq_sums<code>(a, t, num, den);
        const uint64_t squares = ggml_cuda_rq_squares<code::values/4>(a); // by all lanes, whatever their block is
        d = ggml_cuda_rq_stored(num > 0 ? (uint32_t) ((squares << 11) / num) : 0, e);
        zero = zero || __half2float(d) == 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int level = 1 << (code::bits - 1);
#pragma unroll
        for (int k = 0; k < code::n_mid; ++k) {
            level += a[i] > t[k];
        }
        idx[i] = zero ? 0 : (uint32_t) (level ^ neg[i]) & ((1 << code::bits) - 1); // the complement for negative values
    }
    return zero ? __float2half_rn(0.0f) : d;
}

// idx[s]: of value lane + lanes*s, lanes being those that hold a block

static __device__ __forceinline__ uint8_t ggml_cuda_rq_low(const uint32_t (&idx)[4]) {
    return (uint8_t) ((idx[0] & 3) | (idx[1] & 3) << 2 | (idx[2] & 3) << 4 | (idx[3] & 3) << 6);
}

// a block of which this lane is lane of lanes; valid is false for one that is not there
template <typename code>
static __device__ __forceinline__ void ggml_cuda_rq_store(
        const half d, const uint32_t (&idx)[4], typename code::block * y, const int lane, const bool valid) {
    constexpr int lanes = code::values/4;

    if (valid && lane == 0) {
        y->d = d;
    }
    if constexpr (code::bits == 4) {
        if (valid) {
            y->qs[lane]         = (uint8_t) (idx[0] | idx[2] << 4);
            y->qs[lane + lanes] = (uint8_t) (idx[1] | idx[3] << 4);
        }
    } else if (valid) {
        y->qs[lane] = ggml_cuda_rq_low(idx);
    }
    if constexpr (code::bits == 3) {
        // the lower half of the lanes hold the even bits of their byte, the upper one the odd ones
        uint32_t h = (idx[0] >> 2) | (idx[1] >> 2) << 2 | (idx[2] >> 2) << 4 | (idx[3] >> 2) << 6;
        h |= __shfl_xor_sync(0xFFFFFFFF, h, lanes/2, WARP_SIZE) << 1;
        if (valid && lane < lanes/2) {
            y->qh[lane] = (uint8_t) h;
        }
    }
}

// a warp, or half of one, stores the values at x as one block
template <typename code>
static __device__ __forceinline__ void ggml_cuda_rq_quantize(
        const float * x, typename code::block * y, const int lane, const int scale_kind, const bool valid) {
    constexpr int lanes = code::values/4;

    float v[4];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
        v[s] = valid ? x[lane + lanes*s] : 0.0f;
    }
    uint32_t idx[4];
    const half d = ggml_cuda_rq_encode<code>(v, scale_kind, idx);
    ggml_cuda_rq_store<code>(d, idx, y, lane, valid);
}

// the same for values that lie as the rotations have them: v[k] of lane i is value 4*i + k
template <typename code>
static __device__ __forceinline__ void ggml_cuda_rq_quantize_lanes(
        const float (&v)[4], typename code::block * y, const int lane, const int scale_kind, const bool valid) {
    constexpr int lanes = code::values/4;

    uint32_t idx[4];
    const half d = ggml_cuda_rq_encode<code>(v, scale_kind, idx); // whose sums are in integers, hence in any order

    const uint32_t own = idx[0] | idx[1] << 8 | idx[2] << 16 | idx[3] << 24;
#pragma unroll
    for (int s = 0; s < 4; ++s) { // value lane + lanes*s
        idx[s] = (__shfl_sync(0xFFFFFFFF, own, lane/4 + lanes/4*s, lanes) >> 8*(lane % 4)) & 0xFF;
    }
    ggml_cuda_rq_store<code>(d, idx, y, lane, valid);
}

// ---- the rotations, by a warp: v[4*h + k] of lane i is value 128*h + 4*i + k of the row; rows of 64 take half a warp ----

// values of rows of n that a lane holds, and lanes that hold such a row
static constexpr __host__ __device__ int ggml_cuda_rq_held (const int n) { return n < 128 ? 4 : n/32; }
static constexpr __host__ __device__ int ggml_cuda_rq_lanes(const int n) { return n < 128 ? n/4 : 32; }

static __device__ __forceinline__ void ggml_cuda_rq_blocks_planar(float * v, const int lane) {
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
        const float c = ggml_rq_planar[4*lane + k];
        const float s = ggml_rq_planar[4*lane + k + 1];
        const float a = v[k];
        const float b = v[k + 1];
        v[k]     = c*a + s*b;
        v[k + 1] = s*a - c*b;
    }
}

static __device__ __forceinline__ void ggml_cuda_rq_blocks_iso(float * v, const int lane) {
    const float x[4] = { v[0], v[1], v[2], v[3] };
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const float * m = ggml_rq_iso + 16*lane + 4*r;
        v[r] = m[0]*x[0] + m[1]*x[1] + m[2]*x[2] + m[3]*x[3];
    }
}

// blocks of three straddle lanes; n: of a row, of which those that no block takes pass through
template <int n>
static __device__ __forceinline__ void ggml_cuda_rq_blocks_rotor(float * v, const int lane) {
    constexpr int lanes = ggml_cuda_rq_lanes(n);

    float w[8]; // values 4*lane - 2 to 4*lane + 5
    w[0] = __shfl_sync(0xFFFFFFFF, v[2], (lane + lanes - 1) % lanes, lanes);
    w[1] = __shfl_sync(0xFFFFFFFF, v[3], (lane + lanes - 1) % lanes, lanes);
    w[6] = __shfl_sync(0xFFFFFFFF, v[0], (lane + 1) % lanes, lanes);
    w[7] = __shfl_sync(0xFFFFFFFF, v[1], (lane + 1) % lanes, lanes);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        w[k + 2] = v[k];
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const int i = 4*lane + k;
        if (i >= n/3*3) {
            continue;
        }
        const int r = i % 3;
        const float x0 = r == 0 ? w[k + 2] : r == 1 ? w[k + 1] : w[k];
        const float x1 = r == 0 ? w[k + 3] : r == 1 ? w[k + 2] : w[k + 1];
        const float x2 = r == 0 ? w[k + 4] : r == 1 ? w[k + 3] : w[k + 2];
        const float * m = ggml_rq_rotor + 3*i;
        v[k] = m[0]*x0 + m[1]*x1 + m[2]*x2;
    }
}

template <int n, int family>
static __device__ __forceinline__ void ggml_cuda_rq_blocks(float (&v)[ggml_cuda_rq_held(n)], const int lane) {
#pragma unroll
    for (int h = 0; h < ggml_cuda_rq_held(n)/4; ++h) { // B repeats; of 64 it is the first half
        if (family == GGML_RQ_PLANAR) {
            ggml_cuda_rq_blocks_planar(v + 4*h, lane);
        } else if (family == GGML_RQ_ISO) {
            ggml_cuda_rq_blocks_iso(v + 4*h, lane);
        } else {
            ggml_cuda_rq_blocks_rotor<n < 128 ? n : 128>(v + 4*h, lane);
        }
    }
}

template <int n>
static __device__ __forceinline__ void ggml_cuda_rq_hadamard(float (&v)[ggml_cuda_rq_held(n)], const int lane) {
#pragma unroll
    for (int h = 1; h < 4; h *= 2) {
#pragma unroll
        for (int j = 0; j < ggml_cuda_rq_held(n); ++j) {
            if ((j & h) == 0) {
                const float a = v[j];
                const float b = v[j + h];
                v[j]     = a + b;
                v[j + h] = a - b;
            }
        }
    }
#pragma unroll
    for (int h = 1; h < ggml_cuda_rq_lanes(n); h *= 2) {
#pragma unroll
        for (int j = 0; j < ggml_cuda_rq_held(n); ++j) {
            const float other = __shfl_xor_sync(0xFFFFFFFF, v[j], h, WARP_SIZE);
            v[j] = (lane & h) == 0 ? v[j] + other : other - v[j];
        }
    }
    if constexpr (n == 256) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float a = v[j];
            const float b = v[j + 4];
            v[j]     = a + b;
            v[j + 4] = a - b;
        }
    }
    const float norm = n == 256 ? 0.0625f : n == 128 ? 0.08838834764831845f : 0.125f; // 1/sqrt(n)
#pragma unroll
    for (int j = 0; j < ggml_cuda_rq_held(n); ++j) {
        v[j] *= norm;
    }
}

// lane: of those that hold the row
template <int n, int family>
static __device__ __forceinline__ void ggml_cuda_rq_rotate(float (&v)[ggml_cuda_rq_held(n)], const int mode, const int lane) {
    if (mode == GGML_RQ_BLOCK || mode == GGML_RQ_FULL) {
        ggml_cuda_rq_blocks<n, family>(v, lane);
    }
    if (mode == GGML_RQ_HADAMARD || mode == GGML_RQ_FULL) {
        ggml_cuda_rq_hadamard<n>(v, lane);
    }
    if (mode == GGML_RQ_FULL) {
        ggml_cuda_rq_blocks<n, family>(v, lane);
    }
}

// ---- recent rows ----

// The newest and first tokens as they were before quantization (ggml-rq-types.h): those that were held in f16 and behind them
// those of this batch in f32, which are rounded. In our attention kernel CUDA blocks of their own take
// them, parts of the split as any others.
struct ggml_cuda_rq_recent {
    const char * k; // f16 [D, n_held, heads of K, sequences]
    const char * v;
    const char * k_new; // f32 [D, n - n_held, heads of K, sequences]
    const char * v_new;
    const char * mask; // f16 [n, queries, 1, sequences]
    int32_t      n_held;
    int32_t      n;
    int32_t      parts; // 0: there are no such rows
    int32_t      nb_mask;
    int64_t      nb_mask3;
    int64_t      nb_k[3]; // of a row, a head, a sequence
    int64_t      nb_v[3];
    int64_t      nb_k_new[3];
    int64_t      nb_v_new[3];
};
