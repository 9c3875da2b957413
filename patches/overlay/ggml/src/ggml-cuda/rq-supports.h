#pragma once

// What the CUDA backend does with a node that has types of ours. No CUDA in here, so that tests ask it.

#include "ggml-impl.h"
#include "ggml-rq-types.h"

// the values of each block of that type lie together in t
static inline bool ggml_cuda_rq_in_units(const ggml_tensor * t, const ggml_type type) {
    return t->ne[0] % ggml_blck_size(type) == 0 && t->nb[0] == ggml_type_size(t->type);
}

// K and V that our attention kernel is compiled for together with a type of ours
static inline bool ggml_cuda_rq_pairs_with(const ggml_type type) {
    return ggml_rq_is_type(type) || type == GGML_TYPE_F16 || type == GGML_TYPE_Q8_0;
}

// whether we have a say in this node, but for recent rows (rq-recent.cu); supported then tells whether it runs on the device
static inline bool ggml_cuda_rq_decides_node(const ggml_tensor * op, bool & supported) {
    const ggml_tensor * a = op->src[0];
    const ggml_tensor * b = op->src[1];

    if (ggml_rq_op_has_5_bits(op)) {
        supported = ggml_op_is_empty(op->op);
        return true;
    }

    switch (op->op) {
        case GGML_OP_SET_ROWS:
            if (!ggml_rq_is_type(op->type)) {
                return false;
            }
            supported = a->type == GGML_TYPE_F32 && (b->type == GGML_TYPE_I64 || b->type == GGML_TYPE_I32) && ggml_cuda_rq_in_units(a, op->type);
            return true;
        case GGML_OP_GET_ROWS:
            if (!ggml_rq_is_type(a->type)) {
                return false;
            }
            supported = op->type == GGML_TYPE_F32 && b->type == GGML_TYPE_I32 && ggml_cuda_rq_in_units(a, a->type) && ggml_cuda_rq_in_units(op, a->type);
            return true;
        case GGML_OP_CPY:
        case GGML_OP_CONT:
        case GGML_OP_DUP:
            if (!ggml_rq_is_type(a->type) && !ggml_rq_is_type(op->type)) {
                return false;
            }
            supported = (a->type == op->type || a->type == GGML_TYPE_F32 || op->type == GGML_TYPE_F32) &&
                ggml_cuda_rq_in_units(a,  ggml_rq_is_type(a->type) ? a->type : op->type) &&
                ggml_cuda_rq_in_units(op, ggml_rq_is_type(a->type) ? a->type : op->type);
            return true;
        case GGML_OP_FLASH_ATTN_EXT:
            if ((ggml_rq_is_type(b->type) || ggml_rq_is_type(op->src[2]->type)) &&
                    !(ggml_cuda_rq_pairs_with(b->type) && ggml_cuda_rq_pairs_with(op->src[2]->type))) {
                supported = false;
                return true;
            }
            if ((ggml_rq_is_type(b->type) || ggml_rq_is_type(op->src[2]->type)) && ggml_get_op_params_f32(op, 2) != 0.0f &&
                    b->ne[0] != 128 && b->ne[0] != 256 && b->ne[0] != 512) { // upstream's kernels for other heads have no softcap, and do not say so
                supported = false;
                return true;
            }
            return false; // shapes are as upstream's kernels have them
        default:
            return false;
    }
}
