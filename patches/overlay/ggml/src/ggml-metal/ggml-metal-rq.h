#pragma once

// The rotated cache types on Metal: what upstream's host code asks of them. The kernels are in kernels/*rq*.

#include "ggml.h"
#include "../ggml-impl.h"
#include "../ggml-rq-types.h"

#include <stdbool.h>
#include <string.h>

// Types of the same width share one code and its kernels: the name that stands in those of kernels
static inline const char * ggml_metal_rq_type_name(enum ggml_type type) {
    static const char * const codes[] = { "rq2", "rq3", "rq4", "rq5" };

    return ggml_rq_is_type(type) && !ggml_rq_is_sibling(type) ? codes[ggml_rq_type_bits(type) - 2] : ggml_type_name(type);
}

// in the names of kernels, the one place where upstream's host code asks for that of a type, other than in messages
#define ggml_type_name ggml_metal_rq_type_name

// can kernels read K and V of these types together? Both are of one code; blocks are as the heads of each want them
static inline bool ggml_metal_rq_same_code(enum ggml_type a, enum ggml_type b) {
    return ggml_rq_is_type(a) && ggml_rq_is_type(b) ? ggml_rq_type_bits(a) == ggml_rq_type_bits(b) : a == b;
}

// set_rows encodes a block by a whole simdgroup
static inline void ggml_metal_rq_set_rows_threads(enum ggml_type type, int nk0, int * nth, int * nrptg) {
    if (ggml_rq_is_type(type)) {
        *nth   = 32*(nk0 < 4 ? nk0 : 4);
        *nrptg = 1;
    }
}

static inline bool ggml_metal_rq_supports_flash_attn(const struct ggml_tensor * op) {
    const struct ggml_tensor * q = op->src[0];
    const struct ggml_tensor * k = op->src[1];
    const struct ggml_tensor * v = op->src[2];

    const int64_t dk = k->ne[0];
    const int64_t dv = v->ne[0];

    return q->type == GGML_TYPE_F32 && ggml_metal_rq_same_code(k->type, v->type) &&
        ggml_rq_is_sibling(k->type) == (dk % QK_RQ != 0) && ggml_rq_is_sibling(v->type) == (dv % QK_RQ != 0) &&
        ((dk == 64 && dv == 64) || (dk == 128 && dv == 128) || (dk == 192 && dv == 128) || (dk == 256 && dv == 256) || (dk == 320 && dv == 256));
}

// the encoder has one way to choose the scale (ggml-rq.c has more of them, to be compared with)
static inline bool ggml_metal_rq_encodes(void) {
    return ggml_rq_scale_kind() == GGML_RQ_SCALE_INNER;
}

static inline bool ggml_metal_rq_supports_cpy(const struct ggml_tensor * op) {
    const struct ggml_tensor * src = op->src[0];
    const int64_t              n   = ggml_blck_size(ggml_rq_is_type(src->type) ? src->type : op->type);

    // rows are read and written in one piece, and a row of src lies within one of dst, or both are contiguous
    if (!ggml_is_contiguous_rows(src) || !ggml_is_contiguous_rows(op) || src->ne[0] % n != 0 ||
        !(src->ne[0] == op->ne[0] || ggml_is_contiguous(op))) {
        return false;
    }
    if (ggml_rq_is_type(src->type)) {
        return op->type == GGML_TYPE_F32 || op->type == GGML_TYPE_F16;
    }
    return src->type == GGML_TYPE_F32 && ggml_metal_rq_encodes();
}

// true if the operation is for us to decide: it then goes to *supported. An operation on our types that is not named
// here is not supported.
static inline bool ggml_metal_rq_supports_op(const struct ggml_tensor * op, bool has_simdgroup_reduction, bool has_simdgroup_mm, bool * supported) {
    bool ours = ggml_rq_is_type(op->type);
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        ours = ours || (op->src[i] && ggml_rq_is_type(op->src[i]->type));
    }

    if (ggml_op_is_empty(op->op)) {
        return false;
    }
    if (ggml_rq_op_is_for_cpu(op)) {
        *supported = false;
        return true;
    }

    switch (op->op) {
        case GGML_OP_FLASH_ATTN_EXT:
            // with more sources than upstream's it is another operation, whatever its types
            *supported = !op->src[5] && has_simdgroup_reduction && has_simdgroup_mm && ggml_metal_rq_supports_flash_attn(op);
            return ours || op->src[5];
        case GGML_OP_SET_ROWS:
            *supported = has_simdgroup_reduction && op->src[0]->type == GGML_TYPE_F32 && ggml_is_contiguous_rows(op->src[0]) &&
                (op->src[1]->type == GGML_TYPE_I64 || op->src[1]->type == GGML_TYPE_I32) && ggml_metal_rq_encodes();
            return ours;
        case GGML_OP_GET_ROWS:
            *supported = op->type == GGML_TYPE_F32 && op->src[1]->type == GGML_TYPE_I32;
            return ours;
        case GGML_OP_CPY:
        case GGML_OP_DUP:
        case GGML_OP_CONT:
            *supported = ggml_metal_rq_supports_cpy(op);
            return ours;
        default:
            *supported = false;
            return ours;
    }
}
