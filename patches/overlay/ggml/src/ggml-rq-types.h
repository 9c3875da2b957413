#pragma once

// The twelve rotated cache types: their rows in ggml's type table and the hint that marks their rotations.
// Four codes (2 to 5 bits per value) serve all of them, see ggml-rq.h; a type adds only which rotation
// the graph applies to K, V and Q before the code sees them. Their four siblings have blocks of 64 values and no
// family: a cache takes them for heads that are no multiple of 128 and rotates by the type that was asked for.

#include "ggml.h"
#include "ggml-rq.h"

static inline bool ggml_rq_is_type(enum ggml_type type) {
    return type >= GGML_TYPE_PLANAR2 && type <= GGML_TYPE_RQ5_64;
}

// a constant where the type is one
#define GGML_RQ_IS_SIBLING(type) (((type) >= GGML_TYPE_RQ2_64 && (type) <= GGML_TYPE_RQ4_64) || (type) == GGML_TYPE_RQ5_64)

static inline bool ggml_rq_is_sibling(enum ggml_type type) {
    return GGML_RQ_IS_SIBLING(type);
}

// ids of 2 to 4 bits are ordered by family, then by bits, their siblings last; then the same for 5 bits; not for siblings
static inline enum ggml_rq_family ggml_rq_type_family(enum ggml_type type) {
    return (enum ggml_rq_family) (type >= GGML_TYPE_PLANAR5 ? (int) type - (int) GGML_TYPE_PLANAR5 :
                                                              ((int) type - (int) GGML_TYPE_PLANAR2) / 3);
}

static inline int ggml_rq_type_bits(enum ggml_type type) {
    return type >= GGML_TYPE_PLANAR5 ? 5 : 2 + ((int) type - (int) GGML_TYPE_PLANAR2) % 3;
}

// no GPU has kernels for 5 bits yet
static inline bool ggml_rq_is_for_cpu(enum ggml_type type) {
    return ggml_rq_is_type(type) && ggml_rq_type_bits(type) == 5;
}

// whether an operation reads or writes such a type
static inline bool ggml_rq_op_is_for_cpu(const struct ggml_tensor * op) {
    bool res = ggml_rq_is_for_cpu(op->type);
    for (size_t i = 0; i < sizeof(op->src)/sizeof(op->src[0]); ++i) {
        res = res || (op->src[i] && ggml_rq_is_for_cpu(op->src[i]->type));
    }
    return res;
}

// values of a block
static inline int ggml_rq_type_block(enum ggml_type type) {
    return ggml_rq_is_sibling(type) ? QK_RQ_64 : QK_RQ;
}

// the type that heads of n values are stored in where this one is asked for; any other type as it is
static inline enum ggml_type ggml_rq_type_for_head(enum ggml_type type, int64_t n) {
    if (!ggml_rq_is_type(type) || n % QK_RQ == 0 || n % QK_RQ_64 != 0) {
        return type;
    }
    const int bits = ggml_rq_type_bits(type);
    return bits == 5 ? GGML_TYPE_RQ5_64 : (enum ggml_type) ((int) GGML_TYPE_RQ2_64 + bits - 2);
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

// op_params[1] of a MUL_MAT of heads with the matrices of a profile, one per KV head: src0 is [n, n, 1, n_head_kv], src1
// [n, n_tokens, group, n_head_kv]
#define GGML_RQ_HINT_MAP 0x52520000

static inline enum ggml_rq_family ggml_rq_hint_family(int32_t hint) {
    return (enum ggml_rq_family) ((hint >> 8) & 0xff);
}

static inline enum ggml_rq_mode ggml_rq_hint_mode(int32_t hint) {
    return (enum ggml_rq_mode) (hint & 0xff);
}

// Sources of a FLASH_ATTN_EXT with recent rows, beyond upstream's five. Keys and values that were kept in f16
// [head_dim, n_held, n_head_kv, ne3] and those of this batch in f32 [head_dim, n_new, n_head_kv, ne3] are attended to as
// further KV rows, where the mask, f16 [n_held + n_new or more, n_queries, 1, ne3], lets them be seen; the op's own mask hides
// the rows that they stand for. Both masks may be views of one tensor, this one behind the other (ggml_rq_recent_width): a
// backend that has K and V in f16 anyway then puts the rows behind them and takes that tensor as the mask.
// A backend that does not know them must refuse the op (supports_op).
enum ggml_rq_recent_src {
    GGML_RQ_RECENT_K     = 5,
    GGML_RQ_RECENT_V     = 6,
    GGML_RQ_RECENT_MASK  = 7,
    GGML_RQ_RECENT_K_NEW = 8,
    GGML_RQ_RECENT_V_NEW = 9,
};

static inline void ggml_rq_flash_attn_ext_add_recent(struct ggml_tensor * a, struct ggml_tensor * k, struct ggml_tensor * v,
        struct ggml_tensor * mask, struct ggml_tensor * k_new, struct ggml_tensor * v_new) {
    GGML_ASSERT(a->op == GGML_OP_FLASH_ATTN_EXT);
    GGML_ASSERT(k->type == GGML_TYPE_F16 && v->type == GGML_TYPE_F16 && k_new->type == GGML_TYPE_F32 && v_new->type == GGML_TYPE_F32);
    GGML_ASSERT(k->ne[0] == a->src[1]->ne[0] && k_new->ne[0] == k->ne[0] && v->ne[0] == a->src[2]->ne[0] && v_new->ne[0] == v->ne[0]);
    GGML_ASSERT(k->ne[1] == v->ne[1] && k_new->ne[1] == v_new->ne[1]);
    GGML_ASSERT(k->ne[2] == a->src[1]->ne[2] && k_new->ne[2] == k->ne[2] && v->ne[2] == a->src[2]->ne[2] && v_new->ne[2] == v->ne[2]);
    GGML_ASSERT(mask->type == GGML_TYPE_F16 && mask->ne[0] >= k->ne[1] + k_new->ne[1] && mask->ne[1] == a->src[0]->ne[1] && mask->ne[2] == 1);

    a->src[GGML_RQ_RECENT_K]     = k;
    a->src[GGML_RQ_RECENT_V]     = v;
    a->src[GGML_RQ_RECENT_MASK]  = mask;
    a->src[GGML_RQ_RECENT_K_NEW] = k_new;
    a->src[GGML_RQ_RECENT_V_NEW] = v_new;
}

// whether an attention's V is the first values of K (MLA)
static inline bool ggml_rq_v_in_k(const struct ggml_tensor * a) {
    const struct ggml_tensor * k = a->src[1];
    const struct ggml_tensor * v = a->src[2];
    return v->view_src && (v->view_src == k || (v->view_src == k->view_src && v->view_offs == k->view_offs)) && v->type == k->type &&
        v->nb[1] == k->nb[1] && v->nb[2] == k->nb[2] && v->nb[3] == k->nb[3];
}

// whether this attention has recent rows
static inline bool ggml_rq_has_recent(const struct ggml_tensor * a) {
    return a->op == GGML_OP_FLASH_ATTN_EXT && a->src[GGML_RQ_RECENT_MASK];
}

// the columns of both masks together where the one for recent rows lies behind the op's own in one tensor, else 0
static inline int64_t ggml_rq_recent_width(const struct ggml_tensor * a) {
    const struct ggml_tensor * mask = a->src[3];
    const struct ggml_tensor * more = a->src[GGML_RQ_RECENT_MASK];
    return mask && mask->view_src && mask->view_src == more->view_src && mask->nb[1] == more->nb[1] && mask->nb[3] == more->nb[3] &&
        more->view_offs == mask->view_offs + mask->ne[0]*sizeof(ggml_fp16_t) ? mask->ne[0] + more->ne[0] : 0;
}

#define GGML_RQ_TRAITS(TYPE, NAME, CODE) \
    [GGML_TYPE_##TYPE] = { \
        .type_name      = NAME, \
        .blck_size      = GGML_RQ_IS_SIBLING(GGML_TYPE_##TYPE) ? QK_RQ_64 : QK_RQ, \
        .type_size      = sizeof(block_rq##CODE), \
        .is_quantized   = true, \
        .to_float       = (ggml_to_float_t) dequantize_row_rq##CODE, \
        .from_float_ref = (ggml_from_float_t) quantize_row_rq##CODE##_ref, \
    },

#define GGML_RQ_TRAITS_CPU(TYPE, NAME, CODE) \
    [GGML_TYPE_##TYPE] = { \
        .from_float   = quantize_row_rq##CODE, \
        .vec_dot      = ggml_vec_dot_rq##CODE##_q8_0, \
        .vec_dot_type = GGML_TYPE_Q8_0, \
        .nrows        = 1, \
    },
