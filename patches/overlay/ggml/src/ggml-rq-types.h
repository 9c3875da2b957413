#pragma once

// The nine rotated cache types: their rows in ggml's type table and the hint that marks their rotations.
// Three codes (2, 3, 4 bits per value) serve all of them, see ggml-rq.h; a type adds only which rotation
// the graph applies to K, V and Q before the code sees them.

#include "ggml.h"
#include "ggml-rq.h"

static inline bool ggml_rq_is_type(enum ggml_type type) {
    return type >= GGML_TYPE_PLANAR2 && type <= GGML_TYPE_ROTOR4;
}

// ids are ordered by family, then by bits
static inline enum ggml_rq_family ggml_rq_type_family(enum ggml_type type) {
    return (enum ggml_rq_family) (((int) type - (int) GGML_TYPE_PLANAR2) / 3);
}

// op_params[1] of a MUL_MAT whose src0 is one of our rotation matrices. A backend that knows the hint can apply the
// rotation in O(n log n); any other sees a plain dense product and is right, too.
#define GGML_RQ_HINT 0x52510000

static inline int32_t ggml_rq_hint(enum ggml_rq_family family, enum ggml_rq_mode mode) {
    return GGML_RQ_HINT | ((int32_t) family << 8) | (int32_t) mode;
}

static inline bool ggml_rq_hint_is_rotation(int32_t hint) {
    return (hint & 0x7fff0000) == GGML_RQ_HINT;
}

static inline enum ggml_rq_family ggml_rq_hint_family(int32_t hint) {
    return (enum ggml_rq_family) ((hint >> 8) & 0xff);
}

static inline enum ggml_rq_mode ggml_rq_hint_mode(int32_t hint) {
    return (enum ggml_rq_mode) (hint & 0xff);
}

#define GGML_RQ_TRAITS(TYPE, NAME, BITS) \
    [GGML_TYPE_##TYPE] = { \
        .type_name      = NAME, \
        .blck_size      = QK_RQ, \
        .type_size      = sizeof(block_rq##BITS), \
        .is_quantized   = true, \
        .to_float       = (ggml_to_float_t) dequantize_row_rq##BITS, \
        .from_float_ref = (ggml_from_float_t) quantize_row_rq##BITS##_ref, \
    },

#define GGML_RQ_TRAITS_CPU(TYPE, NAME, BITS) \
    [GGML_TYPE_##TYPE] = { \
        .from_float   = quantize_row_rq##BITS, \
        .vec_dot      = ggml_vec_dot_rq##BITS##_q8_0, \
        .vec_dot_type = GGML_TYPE_Q8_0, \
        .nrows        = 1, \
    },

#define GGML_RQ_TYPES(X) \
    X(PLANAR2, "planar2", 2) X(PLANAR3, "planar3", 3) X(PLANAR4, "planar4", 4) \
    X(ISO2,    "iso2",    2) X(ISO3,    "iso3",    3) X(ISO4,    "iso4",    4) \
    X(ROTOR2,  "rotor2",  2) X(ROTOR3,  "rotor3",  3) X(ROTOR4,  "rotor4",  4)
