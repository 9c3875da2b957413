#if !defined(GGML_RQ_DECODE)
#define GGML_RQ_DECODE

// The codes of the rotated cache types, see ggml-rq.h: four values at a time. A block is read as halves of 16 bits: the
// first is the scale, behind it are the indices by bit planes. What depends on the type alone is a constant of the pipeline.

#include "rq_tables.glsl"

bool rq_is_type(uint type) { return type >= RQ_TYPE_FIRST && type <= RQ_TYPE_LAST; }
uint rq_type_bits(uint type) { return type >= RQ_TYPE_FIRST_5 ? 5u : 2u + (type - RQ_TYPE_FIRST) % 3u; }
uint rq_type_block(uint type) {
    return (type >= RQ_SIBLING_FIRST && type < RQ_TYPE_FIRST_5) || type == RQ_TYPE_LAST ? RQ_BLOCK_SIBLING : RQ_BLOCK;
}

// byte k of sixteen, of which a code of up to 4 bits has the first eight
uint rq_byte(uvec4 bytes, uint k, uint bits) {
    const uvec2 half_of = bits == 5u && k >= 8u ? bytes.zw : bytes.xy;

    return ((k & 4u) == 0u ? half_of.x : half_of.y) >> (8u*(k & 3u)) & 0xffu;
}

// Centroids of four indices, a byte each. The codebooks are symmetric: the upper half of the indices are the magnitudes
// from the smallest, the complement of an index has the opposite sign.
vec4 rq_centroids(uint idx, uint bits) {
    const uint neg = ~rq_mask(idx, bits - 1u);
    const uint res = (rq_magnitudes4(idx ^ neg, bits) ^ neg) + (neg & 0x01010101u); // no byte is 0, so that none overflows

    return vec4(bitfieldExtract(int(res), 0, 8), bitfieldExtract(int(res), 8, 8), bitfieldExtract(int(res), 16, 8), int(res) >> 24);
}

// where values i ... i + 3 of a block of n lie, in halves behind the scale: the plane of all or the low bits, that of the high bit
uint rq_low_at (uint i, uint bits, uint n) { return (bits >= 4u ? i % (n/2u) : i % (n/4u))/2u; }
uint rq_high_at(uint i, uint bits, uint n) { return (bits >= 4u ? n/4u : n/8u) + i % (n/8u)/2u; }

// these values; d is the scale as it is stored, low and high are four bytes of the planes
vec4 rq_values(uint i, uint bits, uint n, uint d, uint low, uint high) {
    uint idx;

    if (bits >= 4u) {
        idx = (low >> (4u*(i/(n/2u)))) & 0x0f0f0f0fu;
    } else {
        idx = (low >> (2u*(i/(n/4u)))) & 0x03030303u;
    }
    if ((bits & 1u) != 0u) {
        idx |= ((high >> (i/(n/8u))) & 0x01010101u) << (bits - 1u);
    }

    return rq_centroids(idx, bits)*(unpackHalf2x16(d).x*(1.0/128.0));
}

#define RQ_WORD(DATA, at) (uint(DATA[at]) | uint(DATA[(at) + 1u]) << 16)

// RES = values i ... i + 3 of block ib of DATA, an array of halves. No function, since buffers cannot be passed to one.
#define RQ_DEQUANTIZE4(RES, DATA, ib, i, bits, n) {                     \
    const uint at = (ib)*(1u + (n)*(bits)/16u);                         \
    const uint low = RQ_WORD(DATA, at + 1u + rq_low_at(i, bits, n));    \
    uint high = 0u;                                                     \
    if (((bits) & 1u) != 0u) {                                          \
        high = RQ_WORD(DATA, at + 1u + rq_high_at(i, bits, n));         \
    }                                                                   \
    RES = rq_values(i, bits, n, uint(DATA[at]), low, high);             \
}

#endif // !defined(GGML_RQ_DECODE)
