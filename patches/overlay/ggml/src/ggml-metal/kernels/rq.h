#pragma once

// The codes of the rotated cache types, see ggml-rq.h: decoding in pieces of 4 and 16 values, and the encoder.

#include "common.h"
#include "dequantize.h"

#include "ggml-rq-blocks.h"
#define GGML_RQ_TABLES_ENCODER
#include "ggml-rq-tables.h"

// decoding

// four bytes of a block, which is aligned to two
static inline uint rq_load4(device const uint8_t * p) {
    device const ushort * p2 = (device const ushort *) p;

    return p2[0] | (uint) p2[1] << 16;
}

// four bytes in a register
#define RQ_BYTES(a, b, c, d) ((uint) (a) | (uint) (b) << 8 | (uint) (c) << 16 | (uint) (d) << 24)

// Centroids of four indices, a byte each. The codebooks are symmetric: the upper half of the indices are the
// magnitudes from the smallest, the complement of an index has the opposite sign. The magnitudes are bytes of lo and hi.
static inline float4 rq_centroids(uint idx, short bits, uint lo, uint hi) {
    const uint neg = (~(idx >> (bits - 1)) & 0x01010101)*0xff;
    const uint mag = idx ^ neg;

    float4 res;

    FOR_UNROLL (short k = 0; k < 4; ++k) {
        const uint m = (mag >> (8*k)) & ((1u << (bits - 1)) - 1);
        const float c = ((m < 4 ? lo : hi) >> (8*(m % 4))) & 0xff;

        res[k] = (neg >> (8*k)) & 1 ? -c : c;
    }

    return res;
}

// What the codes are made of, by block: values of one, bits of an index, levels of a sign, thresholds between them
template <typename block_q> struct rq_code;

#define RQ_CODE(CODE, N, VALUES) \
template <> struct rq_code<block_rq##CODE> { \
    enum { SIZE = VALUES, BITS = N, HALF = 1 << (N - 1), MIDS = HALF - 1 }; \
    static int  magnitude(short level) { return ggml_rq##N##_centroids[HALF + level]; } \
    static uint mid2     (short k)     { return ggml_rq##N##_mid2[k]; } \
    static uint start    (short i)     { return ggml_rq##N##_starts[i]; } \
};

RQ_CODE(2, 2, QK_RQ)
RQ_CODE(3, 3, QK_RQ)
RQ_CODE(4, 4, QK_RQ)

RQ_CODE(2_64, 2, QK_RQ_64)
RQ_CODE(3_64, 3, QK_RQ_64)
RQ_CODE(4_64, 4, QK_RQ_64)

// values 4*i ... 4*i + 3 of a block of N, in units of d/128, by bits of an index
template <short BITS, short N> struct rq_decoder;

template <short N> struct rq_decoder<2, N> {
    template <typename block_q> static float4 t4(device const block_q * xb, short i) {
        const uint idx = (rq_load4(xb->qs + 4*(i % (N/16))) >> (2*(i/(N/16)))) & 0x03030303;

        return rq_centroids(idx, 2, RQ_BYTES(ggml_rq2_centroids[2], ggml_rq2_centroids[3], 0, 0), 0);
    }
};

template <short N> struct rq_decoder<3, N> {
    template <typename block_q> static float4 t4(device const block_q * xb, short i) {
        const uint low  = (rq_load4(xb->qs + 4*(i % (N/16))) >> (2*(i/(N/16)))) & 0x03030303;
        const uint high = (rq_load4(xb->qh + 4*(i % (N/32))) >> (i/(N/32)))     & 0x01010101;

        return rq_centroids(low | high << 2, 3,
                RQ_BYTES(ggml_rq3_centroids[4], ggml_rq3_centroids[5], ggml_rq3_centroids[6], ggml_rq3_centroids[7]), 0);
    }
};

template <short N> struct rq_decoder<4, N> {
    template <typename block_q> static float4 t4(device const block_q * xb, short i) {
        const uint idx = (rq_load4(xb->qs + 4*(i % (N/8))) >> (4*(i/(N/8)))) & 0x0f0f0f0f;

        return rq_centroids(idx, 4,
                RQ_BYTES(ggml_rq4_centroids[ 8], ggml_rq4_centroids[ 9], ggml_rq4_centroids[10], ggml_rq4_centroids[11]),
                RQ_BYTES(ggml_rq4_centroids[12], ggml_rq4_centroids[13], ggml_rq4_centroids[14], ggml_rq4_centroids[15]));
    }
};

template <typename block_q>
static inline float4 rq_t4(device const block_q * xb, short i) {
    return rq_decoder<rq_code<block_q>::BITS, rq_code<block_q>::SIZE>::t4(xb, i);
}

// Upstream's attention takes one of these as a template argument. Where 8 threads share a row (NE = 4), a thread asks
// for il, il + 8, il + 16 and il + 24 of a block (of 64 values: il and il + 8): the same bytes of both planes, which are loaded
// once after inlining.
template <typename block_q, typename type4>
void dequantize_rq_t4(device const block_q * xb, short il, thread type4 & reg) {
    reg = (type4) (rq_t4(xb, il)*((float) xb->d*(1.0f/128.0f)));
}

template <typename block_q, typename type4x4>
void dequantize_rq(device const block_q * xb, short il, thread type4x4 & reg) {
    const float d = (float) xb->d*(1.0f/128.0f);

    float4x4 reg_f;

    FOR_UNROLL (short i = 0; i < 4; ++i) {
        reg_f[i] = rq_t4(xb, 4*il + i)*d;
    }

    reg = (type4x4) reg_f;
}

// Encoding, the same as in ggml-rq.c but for floats: they are taken apart as bit patterns, so that neither fast math
// nor flushed denormals can change a byte. Only the scale that keeps the inner product is here (LLAMA_RQ_SCALE=inner).

#define RQ_BITS_INF 0x7f800000 // magnitudes above this are NaN
#define RQ_BITS_MAX 0x477de040 // 64992.25 = 65504*127/128, the largest magnitude that a block holds
#define RQ_BITS_MIN 0x33800000 // 2^-24: blocks that stay below this become zero

// magnitude of a value as a bit pattern, NaN is 0
static inline int rq_magnitude(int w) {
    const int v = w & 0x7fffffff;

    return v > RQ_BITS_INF ? 0 : min(v, RQ_BITS_MAX);
}

static inline bool rq_negative(int w) {
    return w < 0 && (w & 0x7fffffff) <= RQ_BITS_INF;
}

// the magnitude with bit pattern u, scaled by 2^(14 - e) and truncated
static inline int rq_scaled(int u, int e) {
    const int shift = 9 + e + 127 - (u >> 23);

    return shift < 32 ? ((u & 0x7fffff) | 0x800000) >> shift : 0;
}

// s*2^(e - 18) in fp16, rounded to nearest even, at most 65504; s < 2^24, e >= -24
static inline ushort rq_stored(uint s, int e) {
    if (s == 0) {
        return 0;
    }

    const int msb      = 31 - (int) clz(s);
    const int exponent = msb + e - 18;
    const int shift    = max(msb - 10, -(e + 6)); // the last bit is worth 2^(shift + e - 18), at least 2^-24

    uint m;
    if (shift > 0) {
        const uint rest = s & ((1u << shift) - 1);
        const uint half_way = 1u << (shift - 1);
        m = s >> shift;
        m += rest > half_way || (rest == half_way && (m & 1)) ? 1 : 0;
    } else {
        m = s << -shift;
    }

    const int bits = exponent < -14 ? (int) m : ((exponent + 14) << 10) + (int) m; // a carry goes into the exponent

    return min(bits, 0x7bff);
}

// d*2^(18 - e), truncated
static inline uint rq_units(ushort d, int e) {
    const int  exponent = max(d >> 10, 1);
    const uint m        = (d & 0x3ff) | (d >> 10 ? 0x400 : 0);
    const int  shift    = exponent - 7 - e;

    return shift >= 0 ? m << shift : -shift < 32 ? m >> -shift : 0;
}

// A block is encoded by LANES threads of a simdgroup, or by one. Sums are exact, so that their order does not matter. ints: a pointer to the bit
// patterns of its values, in whatever memory they are.
template <short LANES> int  rq_sum(int  x) { return LANES > 1 ? simd_sum(x) : x; }
template <short LANES> int  rq_max(int  x) { return LANES > 1 ? simd_max(x) : x; }

template <typename block_q, short LANES, typename ints>
struct rq_encoder {
    typedef rq_code<block_q> code;

    ints  x;
    short lane;
    int   e;              // exponent of the largest magnitude
    int   t[code::MIDS];  // magnitudes above t[k] take a level beyond k

    // s: scale in units of 2^-11 of a per centroid unit
    void thresholds(uint s) {
        FOR_UNROLL (short k = 0; k < code::MIDS; ++k) {
            t[k] = min((s*code::mid2(k)) >> 12, 32767u);
        }
    }

    short level(int a) const {
        short res = 0;
        FOR_UNROLL (short k = 0; k < code::MIDS; ++k) {
            res += a > t[k] ? 1 : 0;
        }
        return res;
    }

    // sums of a*c and c*c, c the centroids that the thresholds choose
    void sums(thread uint & num, thread uint & den) const {
        int sn = 0;
        int sd = 0;
        for (short j = lane; j < code::SIZE; j += LANES) {
            const int a = rq_scaled(rq_magnitude(x[j]), e);
            const int c = code::magnitude(level(a));
            sn += a*c;
            sd += c*c;
        }
        num = rq_sum<LANES>(sn);
        den = rq_sum<LANES>(sd);
    }

    // sum of a*a, in two parts for lack of a 64-bit simd_sum
    uint64_t squares() const {
        uint lo = 0;
        uint hi = 0;
        for (short j = lane; j < code::SIZE; j += LANES) {
            const uint a  = rq_scaled(rq_magnitude(x[j]), e);
            const uint a2 = a*a;
            lo += a2 & 0xffff;
            hi += a2 >> 16;
        }
        return ((uint64_t) rq_sum<LANES>(hi) << 16) + (uint64_t) rq_sum<LANES>(lo);
    }

    // index of value j, as it is stored
    uint index(short j) const {
        const uint i = code::HALF + level(rq_scaled(rq_magnitude(x[j]), e));

        return (rq_negative(x[j]) ? ~i : i) & ((1u << code::BITS) - 1);
    }

    // num/den in units of 2^-11, rounded down; num < 2^30, den < 2^21
    static uint ratio(uint num, uint den) {
        const uint q = num/den;
        const uint r = num - q*den;

        return (q << 11) + (r << 11)/den;
    }

    // the scale in fp16 and the thresholds of the indices; 0 for a block of zeros
    ushort scale() {
        int umax = 0;
        for (short j = lane; j < code::SIZE; j += LANES) {
            umax = max(umax, rq_magnitude(x[j]));
        }
        umax = rq_max<LANES>(umax);
        if (umax < RQ_BITS_MIN) {
            return 0;
        }
        e = (umax >> 23) - 127;

        const uint amax = rq_scaled(umax, e);

        // least squares: three starts between a clipped and a full range, the best of them refined once
        uint     num;
        uint     den;
        uint     s    = 0;
        uint64_t best = 0;
        for (short i = 0; i < 3; ++i) {
            thresholds((amax*code::start(i)) >> 3);
            sums(num, den);
            const uint     r    = ratio(num, den);
            const uint64_t gain = (uint64_t) r*num;
            if (gain > best) {
                s    = r;
                best = gain;
            }
        }
        thresholds(s);
        sums(num, den);

        // the indices are those of this scale in fp16
        s = rq_units(rq_stored(ratio(num, den), e), e);
        if (s == 0) {
            return 0;
        }
        thresholds(s);

        // what is stored keeps the inner product of the block with what is decoded from it
        sums(num, den);

        return num > 0 ? rq_stored((uint) ((squares() << 11)/num), e) : 0;
    }
};

// the low two bits of all indices
template <typename encoder, typename block_q>
void rq_pack_low(encoder enc, device block_q & y, short lanes) {
    const short n = encoder::code::SIZE/4;

    for (short j = enc.lane; j < n; j += lanes) {
        y.qs[j] = (enc.index(j) & 3) | (enc.index(j + n) & 3) << 2 | (enc.index(j + 2*n) & 3) << 4 | (enc.index(j + 3*n) & 3) << 6;
    }
}

template <short BITS> struct rq_packer;

template <> struct rq_packer<2> {
    template <typename encoder, typename block_q> static void pack(encoder enc, device block_q & y, short lanes) {
        rq_pack_low(enc, y, lanes);
    }
};

template <> struct rq_packer<3> {
    template <typename encoder, typename block_q> static void pack(encoder enc, device block_q & y, short lanes) {
        rq_pack_low(enc, y, lanes);

        const short n = encoder::code::SIZE/8;

        for (short j = enc.lane; j < n; j += lanes) {
            uint bits = 0;
            for (short b = 0; b < 8; ++b) {
                bits |= (enc.index(j + n*b) >> 2) << b;
            }
            y.qh[j] = bits;
        }
    }
};

template <> struct rq_packer<4> {
    template <typename encoder, typename block_q> static void pack(encoder enc, device block_q & y, short lanes) {
        const short n = encoder::code::SIZE/2;

        for (short j = enc.lane; j < n; j += lanes) {
            y.qs[j] = enc.index(j) | enc.index(j + n) << 4;
        }
    }
};

// lane: which of the LANES threads this is
template <typename block_q, short LANES, typename ints>
void quantize_rq(ints x, device block_q & y, short lane) {
    rq_encoder<block_q, LANES, ints> enc;
    enc.x    = x;
    enc.lane = lane;

    const ushort d = enc.scale();
    if (d == 0) {
        for (short i = lane; i < (short) sizeof(block_q)/2; i += LANES) {
            ((device ushort *) &y)[i] = 0;
        }
        return;
    }

    if (lane == 0) {
        y.d = as_type<half>(d);
    }
    rq_packer<rq_code<block_q>::BITS>::pack(enc, y, LANES);
}
