#include "llama-rq-moments.h"

#include "llama-graph.h"

#include "ggml.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

bool llama_rq_sums_moments() {
    const char * value = getenv("LLAMA_RQ_MOMENTS");
    return value && *value && strcmp(value, "0") != 0;
}

struct llama_rq_summed {
    ggml_tensor * x;
    const char  * how; // rope, norm or plain
};

static bool llama_rq_is_norm_weight(const ggml_tensor * t, int64_t n_embd_head) {
    return t->op == GGML_OP_NONE && t->ne[0] == n_embd_head && ggml_nrows(t) == 1;
}

// What RoPE is given for t, or t itself where no RoPE is on its way. What only changes its shape or scale is gone through; so is a norm
// of the heads: RoPE leaves their length, so it may as well be before.
static llama_rq_summed llama_rq_before_rope(ggml_context * ctx, ggml_tensor * t, int64_t n_embd_head) {
    float scale    = 1.0f;
    bool  weighted = false;
    const ggml_tensor * norm = nullptr;

    ggml_tensor * cur = t;
    for (; cur; cur = cur->src[0]) {
        if (cur->op == GGML_OP_SCALE && !norm && !weighted) {
            float params[2]; // factor, offset
            memcpy(params, cur->op_params, sizeof(params));
            if (params[1] != 0.0f) {
                break;
            }
            scale *= params[0];
        } else if (cur->op == GGML_OP_MUL && !norm && !weighted && llama_rq_is_norm_weight(cur->src[1], n_embd_head)) {
            weighted = true;
        } else if (cur->op == GGML_OP_RMS_NORM && !norm && cur->ne[0] == n_embd_head) {
            norm = cur;
        } else if (cur->op != GGML_OP_RESHAPE && cur->op != GGML_OP_VIEW && cur->op != GGML_OP_PERMUTE && cur->op != GGML_OP_CONT) {
            break;
        }
    }
    const bool rope = cur && cur->op == GGML_OP_ROPE && cur->src[0]->ne[0] == n_embd_head && ggml_nelements(cur->src[0]) == ggml_nelements(t)
        && (norm || !weighted);

    ggml_tensor * x = rope ? cur->src[0] : t;
    if (x->type != GGML_TYPE_F32) {
        x = ggml_cast(ctx, x, GGML_TYPE_F32);
    }
    if (rope && norm) {
        float eps;
        memcpy(&eps, norm->op_params, sizeof(eps));
        x = ggml_rms_norm(ctx, x, eps);
    }
    if (rope && scale != 1.0f) {
        x = ggml_scale(ctx, x, scale);
    }
    return { x, !rope ? "plain" : norm ? "norm" : "rope" };
}

// x [head_dim, n_head, n_tokens]
static void llama_rq_add_sums(const llm_graph_context & graph, ggml_tensor * x, char letter, const char * how, int il) {
    ggml_context * ctx = graph.ctx0;

    ggml_tensor * by_token = ggml_cont(ctx, ggml_permute(ctx, x, 1, 2, 0, 3)); // [n_tokens, head_dim, n_head]
    if (letter == 'k') {
        ggml_tensor * sum = ggml_sum_rows(ctx, by_token);
        ggml_format_name(sum, "rq_sum_k_%s-%d", how, il);
        ggml_build_forward_expand(graph.gf, sum);
    }
    ggml_tensor * square = ggml_mul_mat(ctx, by_token, by_token);
    ggml_format_name(square, "rq_sum_%c%c_%s-%d", letter, letter, how, il);
    ggml_build_forward_expand(graph.gf, square);
}

void llama_rq_add_moments(const llm_graph_context & graph, ggml_tensor * q, const ggml_tensor * k) {
    int il;
    if (!k->view_src || sscanf(k->view_src->name, "cache_k_l%d", &il) != 1) {
        return;
    }
    const int64_t n_embd_head = q->ne[0];

    ggml_tensor * stored = nullptr; // K on its way into the cache
    bool summed = false;
    for (int i = ggml_graph_n_nodes(graph.gf) - 1; i >= 0; --i) {
        ggml_tensor * node = ggml_graph_node(graph.gf, i);
        if (!stored && node->op == GGML_OP_SET_ROWS && node->view_src == k->view_src) {
            stored = node->src[0];
        }
        int found;
        char how[6];
        summed = summed || (sscanf(node->name, "rq_sum_k_%5[a-z]-%d", how, &found) == 2 && found == il);
    }
    if (stored && !summed) {
        auto [x, how] = llama_rq_before_rope(graph.ctx0, stored, n_embd_head);
        if (strcmp(how, "plain") == 0) { // heads side by side, as they are stored
            x = ggml_view_3d(graph.ctx0, x, n_embd_head, x->ne[0]/n_embd_head, x->ne[1], n_embd_head*x->nb[0], x->nb[1], 0);
        }
        llama_rq_add_sums(graph, x, 'k', how, il);
    }
    const auto [x, how] = llama_rq_before_rope(graph.ctx0, q, n_embd_head);
    llama_rq_add_sums(graph, x, 'q', how, il);
}
