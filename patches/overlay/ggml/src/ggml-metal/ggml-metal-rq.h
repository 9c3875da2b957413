#pragma once

// The rotated cache types on Metal: what upstream's host code asks of them. The kernels are in kernels/*rq*.

#include "ggml.h"
#include "../ggml-impl.h"
#include "../ggml-rq-types.h"
#include "kernels/rq-args.h"

#include <stdbool.h>
#include <stdint.h>
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

// upstream's, which is asked about its own types
#ifdef __cplusplus
extern "C" {
#endif
struct ggml_metal_device;
bool ggml_metal_device_supports_op(struct ggml_metal_device * dev, const struct ggml_tensor * op);
#ifdef __cplusplus
}
#endif

// A FLASH_ATTN_EXT as upstream's code runs it, which takes K and V of one type and knows nothing of recent rows
struct ggml_metal_rq_node {
    struct ggml_tensor node;

    // what node reads where K and V are unpacked to f16, with the recent rows behind them, all rows of a head together
    bool               in_f16;
    struct ggml_tensor k;
    struct ggml_tensor v;
    struct ggml_tensor mask;
};

static inline void ggml_metal_rq_to_f16(struct ggml_tensor * t, int64_t rows) {
    t->type     = GGML_TYPE_F16;
    t->op       = GGML_OP_NONE;
    t->view_src = NULL;
    t->ne[1]    = rows;
    t->nb[0]    = sizeof(ggml_fp16_t);
    for (int i = 1; i < 4; ++i) {
        t->nb[i] = t->nb[i - 1]*t->ne[i - 1];
    }
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        t->src[i] = NULL;
    }
}

// in_f16: whether K and V are unpacked; an operation on upstream's types alone stays as it is
static inline struct ggml_tensor * ggml_metal_rq_make_node(const struct ggml_tensor * op, bool in_f16, struct ggml_metal_rq_node * res) {
    const bool recent = ggml_rq_has_recent(op);

    res->node   = *op;
    res->in_f16 = in_f16 && (recent || ggml_rq_is_type(op->src[1]->type));
    res->k      = *op->src[1];
    res->v      = *op->src[2];
    if (!recent && !ggml_rq_is_type(op->src[1]->type)) {
        return &res->node;
    }
    if (res->in_f16) {
        const int64_t rows = recent ? ggml_rq_recent_width(op) : op->src[1]->ne[1];
        ggml_metal_rq_to_f16(&res->k, rows);
        if (ggml_rq_v_in_k(op)) {
            res->v       = res->k;
            res->v.ne[0] = op->src[2]->ne[0];
        } else {
            ggml_metal_rq_to_f16(&res->v, rows);
        }
        if (recent) {
            res->mask        = *op->src[3];
            res->mask.ne[0]  = rows;
            res->node.src[3] = &res->mask;
        }
    } else {
        res->v.type = res->k.type; // of the same code: strides tell the rest
    }
    res->node.src[1] = &res->k;
    res->node.src[2] = &res->v;
    for (int i = GGML_RQ_RECENT_K; i <= GGML_RQ_RECENT_V_NEW; ++i) {
        res->node.src[i] = NULL;
    }
    res->node.op_params[4] = 0; // of upstream's, how many rows a mask shows at most
    return &res->node;
}

// What an attention of few queries, which reads K and V as they are, takes more than one over copies for rows behind the last whole tile: an operation
// has memory for either, and upstream computes it from the strides of what is read.
#ifdef __cplusplus
size_t ggml_metal_rq_more_pad(const struct ggml_tensor * op);
#endif

// V as the first 256 of 320 values of K (MLA), for every number of queries in f16: what is named so reads V of our types in blocks of 128
static inline bool ggml_metal_rq_must_be_f16(const struct ggml_tensor * op) {
    return ggml_rq_v_in_k(op) && op->src[1]->ne[0] == 320 && op->src[2]->ne[0] == 256;
}

static inline bool ggml_metal_rq_supports_flash_attn(const struct ggml_tensor * op) {
    const struct ggml_tensor * q = op->src[0];
    const struct ggml_tensor * k = op->src[1];
    const struct ggml_tensor * v = op->src[2];

    const int64_t dk = k->ne[0];
    const int64_t dv = v->ne[0];

    if (q->type == GGML_TYPE_F32 && ggml_rq_v_in_k(op)) {
        return ggml_rq_is_sibling(k->type) && ((dk == 576 && dv == 512) || ggml_metal_rq_must_be_f16(op));
    }
    return q->type == GGML_TYPE_F32 && ggml_metal_rq_same_code(k->type, v->type) &&
        ggml_rq_is_sibling(k->type) == (dk % QK_RQ != 0) && ggml_rq_is_sibling(v->type) == (dv % QK_RQ != 0) &&
        ((dk == 64 && dv == 64) || (dk == 128 && dv == 128) || (dk == 192 && dv == 128) || (dk == 256 && dv == 256) || (dk == 320 && dv == 256) || (dk == 512 && dv == 512));
}

// whether rows of t are read by vectors of four
static inline bool ggml_metal_rq_in_fours(const struct ggml_tensor * t) {
    const size_t four = 4*ggml_type_size(t->type);
    return t->ne[0] % 4 == 0 && t->nb[0] == four/4 && t->nb[1] % four == 0 && t->nb[2] % four == 0 && t->nb[3] % four == 0 && t->view_offs % four == 0;
}

// attention with recent rows, but for what it is without
static inline bool ggml_metal_rq_supports_recent(const struct ggml_tensor * op) {
    const struct ggml_tensor * k = op->src[1];
    const struct ggml_tensor * v = op->src[2];

    switch (k->type) {
        case GGML_TYPE_F16:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q8_0:
            break;
        default:
            if (!ggml_rq_is_type(k->type)) {
                return false;
            }
    }
    for (int i = GGML_RQ_RECENT_K; i <= GGML_RQ_RECENT_V_NEW; ++i) {
        if (i != GGML_RQ_RECENT_MASK && !(ggml_metal_rq_in_fours(op->src[i]) && op->src[i]->ne[3] == op->src[0]->ne[3])) {
            return false;
        }
    }
    return op->src[0]->type == GGML_TYPE_F32 && ggml_metal_rq_in_fours(op->src[0]) && !ggml_rq_v_in_k(op) && k->ne[3] == op->src[0]->ne[3] &&
        k->ne[0] % 16 == 0 && v->ne[0] % 16 == 0 && v->ne[0] <= RQ_RECENT_MAX_DV &&
        ggml_rq_recent_width(op) >= k->ne[1] + op->src[GGML_RQ_RECENT_K]->ne[1] + op->src[GGML_RQ_RECENT_K_NEW]->ne[1];
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
static inline bool ggml_metal_rq_supports_op(struct ggml_metal_device * dev, const struct ggml_tensor * op, bool has_simdgroup_reduction, bool has_simdgroup_mm,
        bool * supported) {
    bool ours = ggml_rq_is_type(op->type);
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        ours = ours || (op->src[i] && ggml_rq_is_type(op->src[i]->type));
    }

    if (ggml_op_is_empty(op->op)) {
        return false;
    }
    if (ggml_rq_op_has_5_bits(op)) {
        *supported = false;
        return true;
    }

    switch (op->op) {
        case GGML_OP_FLASH_ATTN_EXT:
            // with more sources than upstream's it is another operation, whatever its types
            *supported = has_simdgroup_reduction && has_simdgroup_mm && (!ours || ggml_metal_rq_supports_flash_attn(op));
            if (*supported && op->src[5]) {
                struct ggml_metal_rq_node plain;
                *supported = ggml_rq_has_recent(op) && ggml_metal_rq_supports_recent(op) &&
                    (ours || ggml_metal_device_supports_op(dev, ggml_metal_rq_make_node(op, false, &plain)));
            }
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
