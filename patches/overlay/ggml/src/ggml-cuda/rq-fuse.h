#pragma once

// Which nodes of a graph go together: the rotations and stores of Q, K and V of a layer, attention and the rotation of its
// output. No CUDA in here, so that tests run it on graphs made by ggml.

#include "ggml-impl.h"
#include "ggml-rq-types.h"

#define GGML_CUDA_RQ_MAX_ROTATIONS 3

struct ggml_cuda_rq_rotation {
    ggml_tensor * rot;   // the MUL_MAT
    ggml_tensor * store; // the SET_ROWS that takes its result to a cache of ours, or nullptr
    bool          keep;  // whether any other node reads the result
};

struct ggml_cuda_rq_fusion {
    ggml_cuda_rq_rotation rotations[GGML_CUDA_RQ_MAX_ROTATIONS];
    int n;       // rotations
    int n_nodes; // that the launch stands for, views between them too
};

// whether the node is a rotation of ours that has a fast form, and not left to the dense product
static inline bool ggml_cuda_rq_is_rotation(const ggml_tensor * node) {
    if (node->op != GGML_OP_MUL_MAT || !ggml_rq_hint_is_rotation(ggml_get_op_params_i32(node, 1))) {
        return false;
    }
    const ggml_tensor * src = node->src[1];
    const int64_t       n   = src->ne[0];
    return ggml_rq_hint_family(ggml_get_op_params_i32(node, 1)) <= GGML_RQ_ROTOR && (n == QK_RQ || n == 2*QK_RQ) &&
        node->src[0]->ne[1] == n && src->type == GGML_TYPE_F32 && node->type == GGML_TYPE_F32 &&
        ggml_is_contiguous(src) && ggml_is_contiguous(node);
}

// whether the node stores all that rot computes, in its order, as rows of a cache of ours
static inline bool ggml_cuda_rq_stores(const ggml_tensor * node, const ggml_tensor * rot) {
    const ggml_tensor * src = node->src[0];
    return node->op == GGML_OP_SET_ROWS && ggml_rq_is_type(node->type) && src->view_src == rot && src->view_offs == 0 &&
        ggml_is_contiguous(src) && ggml_nelements(src) == ggml_nelements(rot) && src->ne[0] % QK_RQ == 0 && src->ne[2] == 1 && src->ne[3] == 1 &&
        (node->src[1]->type == GGML_TYPE_I64 || node->src[1]->type == GGML_TYPE_I32);
}

// whether nodes first to last - 1 alone read t, once
static inline bool ggml_cuda_rq_used_once(const ggml_cgraph * graph, const int first, const int last, const ggml_tensor * t) {
    for (int i = first; i < last; ++i) {
        if (graph->nodes[i] == t) {
            return ggml_node_get_use_count(graph, i) == 1 && (t->flags & GGML_TENSOR_FLAG_OUTPUT) == 0;
        }
    }
    return false;
}

// the same for t and all that views of it make of it, up to view
static inline bool ggml_cuda_rq_chain_used_once(const ggml_cgraph * graph, const int first, const int last, const ggml_tensor * t, const ggml_tensor * view) {
    while (view != t && ggml_cuda_rq_used_once(graph, first, last, view)) {
        view = view->src[0];
    }
    return view == t && ggml_cuda_rq_used_once(graph, first, last, t);
}

static inline bool ggml_cuda_rq_overlap(const ggml_tensor * a, const ggml_tensor * b) {
    return (const char *) a->data < (const char *) b->data + ggml_nbytes(b) && (const char *) b->data < (const char *) a->data + ggml_nbytes(a);
}

// whether what a writes may be written while b is read and written
static inline bool ggml_cuda_rq_independent(const ggml_cuda_rq_rotation & a, const ggml_cuda_rq_rotation & b) {
    return !a.keep || (!ggml_cuda_rq_overlap(a.rot, b.rot->src[1]) && (!b.keep || a.rot == b.rot || !ggml_cuda_rq_overlap(a.rot, b.rot)) &&
        (!b.store || !ggml_cuda_rq_overlap(a.rot, b.store->src[1])));
}

// what follows from node first on, with at most n_max rotations
static inline ggml_cuda_rq_fusion ggml_cuda_rq_collect(const ggml_cgraph * graph, const int first, const int n_max) {
    ggml_cuda_rq_fusion f = {};
    int last = first; // behind the last node that is taken

    for (int i = first; i < graph->n_nodes; ++i) {
        ggml_tensor * node = graph->nodes[i];
        if (ggml_op_is_empty(node->op) || ggml_is_empty(node)) {
            continue;
        }
        if ((node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) {
            break;
        }
        if (ggml_cuda_rq_is_rotation(node)) {
            if (f.n == n_max || node->ne[0] != graph->nodes[first]->ne[0]) {
                break;
            }
            f.rotations[f.n++] = { node, nullptr, true };
        } else {
            ggml_cuda_rq_rotation * r = f.rotations;
            while (r < f.rotations + f.n && (r->store || !ggml_cuda_rq_stores(node, r->rot))) {
                ++r;
            }
            if (r == f.rotations + f.n) {
                break;
            }
            r->store = node;
            r->keep  = !ggml_cuda_rq_chain_used_once(graph, first, i, r->rot, node->src[0]);
        }
        last = i + 1;
    }

    f.n_nodes = f.n > 1 || (f.n == 1 && f.rotations[0].store) ? last - first : 0;
    return f;
}

static inline bool ggml_cuda_rq_all_independent(const ggml_cuda_rq_fusion & f) {
    for (int i = 0; i < f.n; ++i) {
        for (int j = 0; j < f.n; ++j) {
            if (!ggml_cuda_rq_independent(f.rotations[i], f.rotations[j])) {
                return false;
            }
        }
    }
    return true;
}

// What one launch can do from node first on: as many rotations as there are of which none is written where something else is
// read, for they were planned to run one after the other. n_nodes is 0 where that is no more than the node itself.
static inline ggml_cuda_rq_fusion ggml_cuda_rq_fuse(const ggml_cgraph * graph, const int first) {
    for (int n = GGML_CUDA_RQ_MAX_ROTATIONS; n > 0; --n) {
        const ggml_cuda_rq_fusion f = ggml_cuda_rq_collect(graph, first, n);
        if (ggml_cuda_rq_all_independent(f)) {
            return f;
        }
    }
    return {};
}

// The rotation that follows attention node first and alone reads its result, and how many nodes lie from one to the other;
// nullptr where there is none.
static inline ggml_tensor * ggml_cuda_rq_rotation_of(const ggml_cgraph * graph, const int first, int & n_nodes) {
    const ggml_tensor * attn = graph->nodes[first];
    int i = first + 1;
    while (i < graph->n_nodes && ggml_op_is_empty(graph->nodes[i]->op)) {
        ++i;
    }
    if (i == graph->n_nodes || !ggml_cuda_rq_is_rotation(graph->nodes[i])) {
        return nullptr;
    }
    ggml_tensor * rot = graph->nodes[i];
    ggml_tensor * src = rot->src[1];
    if ((rot->flags & GGML_TENSOR_FLAG_COMPUTE) == 0 || src->view_src != attn || src->view_offs != 0 || src->ne[0] != attn->ne[0] ||
            ggml_nelements(src) != ggml_nelements(attn) || !ggml_cuda_rq_chain_used_once(graph, first, i, attn, src)) {
        return nullptr;
    }
    n_nodes = i - first;
    return rot;
}
