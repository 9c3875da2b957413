#pragma once

// Which nodes of a graph go together: the rotations and stores of Q, K and V of a layer, attention and the rotation of its
// output. No CUDA in here, so that tests run it on graphs made by ggml.

#include "ggml-impl.h"
#include "ggml-rq-types.h"

#define GGML_CUDA_RQ_MAX_ROTATIONS 3
#define GGML_CUDA_RQ_MAP_TOKENS    32  // beyond, a product by tensor cores is the faster one
#define GGML_CUDA_RQ_MAP_MAX       512 // values of a head

// a rotation, or a product of heads with the matrices of a profile
struct ggml_cuda_rq_rotation {
    ggml_tensor * rot;   // the MUL_MAT
    ggml_tensor * store; // the SET_ROWS that takes its result to a cache of ours, or nullptr
    bool          keep;  // whether any other node reads the result
    bool          map;   // whether it is such a product
    ggml_tensor * sub;   // of those: the SUB of a mean before it, or nullptr
    ggml_tensor * cont;  // the CONT that puts the heads of a token side by side, or nullptr: then that is the result
};

struct ggml_cuda_rq_fusion {
    ggml_cuda_rq_rotation rotations[GGML_CUDA_RQ_MAX_ROTATIONS];
    int n;       // rotations
    int n_nodes; // that the launch stands for, views between them too
};

// what it reads and what it writes where other nodes read it
static inline const ggml_tensor * ggml_cuda_rq_input (const ggml_cuda_rq_rotation & r) { return r.sub ? r.sub->src[0] : r.rot->src[1]; }
static inline       ggml_tensor * ggml_cuda_rq_result(const ggml_cuda_rq_rotation & r) { return r.cont ? r.cont : r.rot; }

// whether the node is a rotation of ours that has a fast form, and not left to the dense product
static inline bool ggml_cuda_rq_is_rotation(const ggml_tensor * node) {
    if (node->op != GGML_OP_MUL_MAT || !ggml_rq_hint_is_rotation(ggml_get_op_params_i32(node, 1))) {
        return false;
    }
    const ggml_tensor * src = node->src[1];
    const int64_t       n   = src->ne[0];
    return ggml_rq_hint_family(ggml_get_op_params_i32(node, 1)) <= GGML_RQ_ROTOR && (n == QK_RQ_64 || n == QK_RQ || n == 2*QK_RQ) &&
        node->src[0]->ne[1] == n && src->type == GGML_TYPE_F32 && node->type == GGML_TYPE_F32 &&
        ggml_is_contiguous(src) && ggml_is_contiguous(node);
}

// whether the node multiplies heads by the matrices of a profile, and few enough of them
static inline bool ggml_cuda_rq_is_map(const ggml_tensor * node) {
    if (node->op != GGML_OP_MUL_MAT || ggml_get_op_params_i32(node, 1) != GGML_RQ_HINT_MAP) {
        return false;
    }
    const ggml_tensor * map = node->src[0];
    const ggml_tensor * src = node->src[1];
    const int64_t       n   = map->ne[0];
    return (map->type == GGML_TYPE_F16 || map->type == GGML_TYPE_F32) && ggml_is_contiguous(map) && map->ne[1] == n && map->ne[2] == 1 &&
        n % QK_RQ_64 == 0 && n <= GGML_CUDA_RQ_MAP_MAX && src->ne[3] == map->ne[3] && src->ne[1] <= GGML_CUDA_RQ_MAP_TOKENS &&
        src->type == GGML_TYPE_F32 && src->nb[0] == sizeof(float) && node->type == GGML_TYPE_F32 && ggml_is_contiguous(node);
}

// whether the node takes the same mean per head off each token [n, n_head, n_tokens]
static inline bool ggml_cuda_rq_is_mean(const ggml_tensor * node) {
    if (node->op != GGML_OP_SUB) {
        return false;
    }
    const ggml_tensor * src  = node->src[0];
    const ggml_tensor * mean = node->src[1];
    return src->type == GGML_TYPE_F32 && src->nb[0] == sizeof(float) && mean->type == GGML_TYPE_F32 && ggml_is_contiguous(mean) &&
        node->type == GGML_TYPE_F32 && mean->ne[0] == src->ne[0] && mean->ne[1] == src->ne[1] && mean->ne[2] == 1 && mean->ne[3] == 1 && src->ne[3] == 1;
}

// whether the node stores all that rot computes, in its order, as rows of a cache of ours
static inline bool ggml_cuda_rq_stores(const ggml_tensor * node, const ggml_tensor * rot) {
    const ggml_tensor * src = node->src[0];
    return node->op == GGML_OP_SET_ROWS && ggml_rq_is_type(node->type) && src->view_src == rot && src->view_offs == 0 &&
        ggml_is_contiguous(src) && ggml_nelements(src) == ggml_nelements(rot) && src->ne[0] % ggml_rq_type_block(node->type) == 0 && src->ne[2] == 1 && src->ne[3] == 1 &&
        (rot->ne[0] >= QK_RQ ? !ggml_rq_is_sibling(node->type) : true) &&
        (node->src[1]->type == GGML_TYPE_I64 || node->src[1]->type == GGML_TYPE_I32);
}

// the same for heads of a token that lie side by side in result, which a product with matrices or a CONT behind it has made
static inline bool ggml_cuda_rq_stores_heads(const ggml_tensor * node, const ggml_tensor * result, const int64_t n) {
    const ggml_tensor * src = node->src[0];
    return node->op == GGML_OP_SET_ROWS && ggml_rq_is_type(node->type) && (src == result || src->view_src == result) && src->view_offs == 0 &&
        ggml_is_contiguous(src) && ggml_nelements(src) == ggml_nelements(result) && n % ggml_rq_type_block(node->type) == 0 && src->ne[0] % n == 0 &&
        src->ne[2] == 1 && src->ne[3] == 1 && (node->src[1]->type == GGML_TYPE_I64 || node->src[1]->type == GGML_TYPE_I32);
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
    const ggml_tensor * out = ggml_cuda_rq_result(a);
    return !a.keep || (!ggml_cuda_rq_overlap(out, ggml_cuda_rq_input(b)) && (!b.keep || a.rot == b.rot || !ggml_cuda_rq_overlap(out, ggml_cuda_rq_result(b))) &&
        (!b.store || !ggml_cuda_rq_overlap(out, b.store->src[1])));
}

// the first node from i on that is no view, or nullptr
static inline ggml_tensor * ggml_cuda_rq_next(const ggml_cgraph * graph, int i) {
    while (i < graph->n_nodes && (ggml_op_is_empty(graph->nodes[i]->op) || ggml_is_empty(graph->nodes[i]))) {
        ++i;
    }
    return i < graph->n_nodes ? graph->nodes[i] : nullptr;
}

// whether node i is the mean that a product right behind it alone wants taken off
static inline bool ggml_cuda_rq_is_mean_of_map(const ggml_cgraph * graph, const int i) {
    const ggml_tensor * sub  = graph->nodes[i];
    const ggml_tensor * next = ggml_cuda_rq_next(graph, i + 1);
    return ggml_cuda_rq_is_mean(sub) && next && ggml_cuda_rq_is_map(next) && next->src[1]->view_src == sub && next->src[1]->view_offs == 0 &&
        next->src[1]->ne[2] == 1 && ggml_cuda_rq_chain_used_once(graph, i, graph->n_nodes, sub, next->src[1]);
}

// whether node i may be the first of those that go together
static inline bool ggml_cuda_rq_begins(const ggml_cgraph * graph, const int i) {
    return ggml_cuda_rq_is_rotation(graph->nodes[i]) || ggml_cuda_rq_is_map(graph->nodes[i]) || ggml_cuda_rq_is_mean_of_map(graph, i);
}

// what follows from node first on, with at most n_max rotations and products
static inline ggml_cuda_rq_fusion ggml_cuda_rq_collect(const ggml_cgraph * graph, const int first, const int n_max) {
    ggml_cuda_rq_fusion f = {};
    int last = first; // behind the last node that is taken
    ggml_tensor * sub = nullptr; // of the product to come

    const ggml_tensor * rotation = nullptr; // the first

    for (int i = first; i < graph->n_nodes; ++i) {
        ggml_tensor * node = graph->nodes[i];
        if (ggml_op_is_empty(node->op) || ggml_is_empty(node)) {
            continue;
        }
        if ((node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) {
            break;
        }
        if (f.n < n_max && ggml_cuda_rq_is_mean_of_map(graph, i)) {
            sub = node; // not taken yet: last stays
            continue;
        }
        if (ggml_cuda_rq_is_map(node)) {
            if (f.n == n_max) {
                break;
            }
            f.rotations[f.n++] = { node, nullptr, true, true, sub, nullptr };
            sub = nullptr;
        } else if (ggml_cuda_rq_is_rotation(node)) {
            if (f.n == n_max || (rotation && node->ne[0] != rotation->ne[0])) {
                break;
            }
            rotation = rotation ? rotation : node;
            f.rotations[f.n++] = { node, nullptr, true, false, nullptr, nullptr };
        } else if (node->op == GGML_OP_CONT) {
            ggml_cuda_rq_rotation * r = f.rotations;
            while (r < f.rotations + f.n && !(r->map && !r->store && !r->cont && node->src[0]->view_src == r->rot && node->src[0]->view_offs == 0 &&
                    ggml_nelements(node) == ggml_nelements(r->rot) && node->ne[0] == r->rot->ne[0] && node->ne[1] == r->rot->ne[2]*r->rot->ne[3] &&
                    ggml_cuda_rq_chain_used_once(graph, first, i, r->rot, node->src[0]))) {
                ++r;
            }
            if (r == f.rotations + f.n) {
                break;
            }
            r->cont = node;
        } else {
            ggml_cuda_rq_rotation * r = f.rotations;
            while (r < f.rotations + f.n && (r->store || !(r->map ? r->rot->src[1]->ne[2] == 1 && (r->cont || r->rot->ne[1] == 1) &&
                    ggml_cuda_rq_stores_heads(node, ggml_cuda_rq_result(*r), r->rot->ne[0]) : ggml_cuda_rq_stores(node, r->rot)))) {
                ++r;
            }
            if (r == f.rotations + f.n) {
                break;
            }
            r->store = node;
            r->keep  = !ggml_cuda_rq_chain_used_once(graph, first, i, ggml_cuda_rq_result(*r), node->src[0]);
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
    if ((rot->flags & GGML_TENSOR_FLAG_COMPUTE) == 0 || src->view_src != attn || src->view_offs != 0 || attn->ne[0] % src->ne[0] != 0 ||
            ggml_nelements(src) != ggml_nelements(attn) || !ggml_cuda_rq_chain_used_once(graph, first, i, attn, src)) {
        return nullptr;
    }
    n_nodes = i - first;
    return rot;
}
