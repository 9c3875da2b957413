#pragma once

// Codes and rotations of the rq cache types: planar2 to planar5, iso2 to iso5, rotor2 to rotor5.
//
// A block holds n = 128 values: a little-endian fp16 scale d and an index per value into a table of int8 centroids.
// value = d * centroid / 128. The family (planar, iso, rotor) names the rotation that the graph applies to Q, K and
// V; the blocks of the three families are the same, so that there is one code per number of bits. Each has a sibling
// with blocks of n = 64 values, for heads that 128 does not divide.
//
// qs at 2 and 3 bits: bits 2*s and 2*s + 1 of byte j are the low bits of the index of element j + n/4*s, s = 0..3
// qs at 4 and 5 bits: the low nibble of byte j has the low bits of the index of element j, the high one of element j + n/2
// qh at 3 and 5 bits: bit b of byte j is the highest bit of the index of element j + n/8*b, b = 0..7

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include "ggml.h"
#include "ggml-rq-blocks.h"
#include "ggml-rq-tables.h"

#ifdef __cplusplus
extern "C" {
#endif

enum ggml_rq_family {
    GGML_RQ_PLANAR = 0, // 64 reflections of 2-D blocks (of 128 values)
    GGML_RQ_ISO    = 1, // 32 4-D blocks x -> p*x*q, p and q pure unit quaternions
    GGML_RQ_ROTOR  = 2, // 42 half-turns of 3-D blocks, the last 2 values pass through
};

enum ggml_rq_mode {
    GGML_RQ_NONE     = 0, // identity
    GGML_RQ_BLOCK    = 1, // B, the block-diagonal matrix of the family
    GGML_RQ_HADAMARD = 2, // H, orthonormal Walsh-Hadamard
    GGML_RQ_FULL     = 3, // B*H*B
};

// How the encoder chooses the scale of a block. All but the first are there to be compared with.
enum ggml_rq_scale {
    GGML_RQ_SCALE_INNER = 0, // the inner product of a block with what is decoded from it is that with itself
    GGML_RQ_SCALE_LSQ   = 1, // least squares
    GGML_RQ_SCALE_NORM  = 2, // from the norm of the block, as it was published
};

// what LLAMA_RQ_SCALE asked for when it was first needed, on every backend; a name that there is not counts as inner here
GGML_API enum ggml_rq_scale ggml_rq_scale_kind(void);

// "inner", "lsq" or "norm"
GGML_API const char * ggml_rq_scale_name(enum ggml_rq_scale scale);

// false if there is no such name; nullptr and "" are inner
GGML_API bool ggml_rq_scale_from_name(const char * name, enum ggml_rq_scale * scale);

// quantization, k is a multiple of 128, for the siblings of 64
// NaN is encoded as 0, infinities and magnitudes beyond 64992.25 as 64992.25 with their sign
GGML_API void quantize_row_rq2_ref(const float * GGML_RESTRICT x, block_rq2 * GGML_RESTRICT y, int64_t k);
GGML_API void quantize_row_rq3_ref(const float * GGML_RESTRICT x, block_rq3 * GGML_RESTRICT y, int64_t k);
GGML_API void quantize_row_rq4_ref(const float * GGML_RESTRICT x, block_rq4 * GGML_RESTRICT y, int64_t k);
GGML_API void quantize_row_rq5_ref(const float * GGML_RESTRICT x, block_rq5 * GGML_RESTRICT y, int64_t k);

GGML_API void quantize_row_rq2_64_ref(const float * GGML_RESTRICT x, block_rq2_64 * GGML_RESTRICT y, int64_t k);
GGML_API void quantize_row_rq3_64_ref(const float * GGML_RESTRICT x, block_rq3_64 * GGML_RESTRICT y, int64_t k);
GGML_API void quantize_row_rq4_64_ref(const float * GGML_RESTRICT x, block_rq4_64 * GGML_RESTRICT y, int64_t k);
GGML_API void quantize_row_rq5_64_ref(const float * GGML_RESTRICT x, block_rq5_64 * GGML_RESTRICT y, int64_t k);

GGML_API void dequantize_row_rq2(const block_rq2 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_rq3(const block_rq3 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_rq4(const block_rq4 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_rq5(const block_rq5 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);

GGML_API void dequantize_row_rq2_64(const block_rq2_64 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_rq3_64(const block_rq3_64 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_rq4_64(const block_rq4_64 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_rq5_64(const block_rq5_64 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);

// fill dst with the n x n row-major rotation of n values; every rotation is symmetric and its own inverse; false if
// family, mode or n (none of 64, 128, 256) is not valid
GGML_API bool ggml_rq_rotation_matrix(int family, int mode, int64_t n, float * dst);

// the same rotation of one row of n values, in O(n) for blocks and O(n log n) for Hadamard; x == y is allowed
GGML_API bool ggml_rq_rotate_row(int family, int mode, const float * x, float * y, int64_t n);

#ifdef __cplusplus
}
#endif
