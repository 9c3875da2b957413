#include "llama-rq-device.h"
#include "llama-rq-modes.h"

#include "llama-hparams.h"

#include "../ggml/src/ggml-rq-types.h"

#include <cmath>
#include <memory>

llama_rq_shape llama_rq_shape::of(const llama_hparams & hparams, uint32_t il) {
    return { hparams.n_embd_head_k(il), hparams.n_embd_head_v(il), hparams.n_head(il), hparams.n_head_kv(il),
        hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f, hparams.is_mla() };
}

ggml_type llama_rq_shape::stored(ggml_type asked, bool is_v) const {
    return ggml_rq_type_for_head(asked, llama_rq_whole(n_embd_head_k, n_embd_head_v, v_in_k, is_v));
}

// [n_embd_head, n_kv, n_head_kv] as the cache gives it to the attention
static ggml_tensor * llama_rq_cells(ggml_context * ctx, ggml_type type, int64_t n_embd_head, int64_t n_head_kv, int64_t n_kv) {
    return ggml_permute(ctx, ggml_new_tensor_4d(ctx, type, n_embd_head, n_head_kv, n_kv, 1), 0, 2, 1, 3);
}

// V of these shapes beside k, of which it is a view with MLA
static ggml_tensor * llama_rq_values(ggml_context * ctx, ggml_type type_v, const llama_rq_shape & shape, ggml_tensor * k) {
    return shape.v_in_k ? ggml_view_4d(ctx, k, shape.n_embd_head_v, k->ne[1], k->ne[2], k->ne[3], k->nb[1], k->nb[2], k->nb[3], 0) :
        llama_rq_cells(ctx, type_v, shape.n_embd_head_v, shape.n_head_kv, k->ne[1]);
}

// n_tokens queries attend to so many cells
static ggml_tensor * llama_rq_attention(ggml_context * ctx, ggml_type type_k, ggml_type type_v, const llama_rq_shape & shape, int64_t n_kv, int64_t n_tokens,
        ggml_tensor * mask) {
    ggml_tensor * k = llama_rq_cells(ctx, type_k, shape.n_embd_head_k, shape.n_head_kv, n_kv);
    ggml_tensor * v = llama_rq_values(ctx, type_v, shape, k);
    ggml_tensor * q = llama_rq_cells(ctx, GGML_TYPE_F32, shape.n_embd_head_k, shape.n_head, n_tokens);
    return ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0f/std::sqrt((float) shape.n_embd_head_k), 0.0f, shape.softcap);
}

bool llama_rq_device_knows(ggml_backend_dev_t dev, ggml_type type) {
    const ggml_init_params params = { /*.mem_size =*/ ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true };
    const std::unique_ptr<ggml_context, decltype(&ggml_free)> held(ggml_init(params), ggml_free);

    return ggml_backend_dev_supports_op(dev, ggml_new_tensor_1d(held.get(), type, ggml_blck_size(type)));
}

std::string llama_rq_device_lacks(ggml_backend_dev_t dev, ggml_type asked_k, ggml_type asked_v, const llama_rq_shape & shape, bool flash_attn) {
    const ggml_type type_k = shape.stored(asked_k, false);
    const ggml_type type_v = shape.stored(asked_v, true);

    const ggml_init_params params = { /*.mem_size =*/ 64*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true };
    const std::unique_ptr<ggml_context, decltype(&ggml_free)> held(ggml_init(params), ggml_free);
    ggml_context * ctx = held.get();

    const int64_t n_kv = 256;

    for (const bool is_v : { false, true }) {
        if (is_v && shape.v_in_k) {
            continue;
        }
        const ggml_type asked       = is_v ? asked_v : asked_k;
        const int64_t   n_embd_head = is_v ? shape.n_embd_head_v : shape.n_embd_head_k;
        const int64_t   n_embd      = n_embd_head*shape.n_head_kv;
        ggml_tensor * cells = ggml_new_tensor_2d(ctx, is_v ? type_v : type_k, n_embd, n_kv);
        ggml_tensor * rows  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_embd, 1);
        if (!ggml_backend_dev_supports_op(dev, ggml_set_rows(ctx, cells, rows, ggml_new_tensor_1d(ctx, GGML_TYPE_I64, 1)))) {
            return std::string("cannot store rows of ") + ggml_type_name(asked) + " at head_dim " + std::to_string(n_embd_head);
        }
    }

    // one token and a prompt
    for (const int64_t n_tokens : { 1, 512 }) {
        if (!flash_attn) {
            ggml_tensor * k = llama_rq_cells(ctx, type_k, shape.n_embd_head_k, shape.n_head_kv, n_kv);
            ggml_tensor * q = llama_rq_cells(ctx, GGML_TYPE_F32, shape.n_embd_head_k, shape.n_head, n_tokens);
            if (!ggml_backend_dev_supports_op(dev, ggml_mul_mat(ctx, k, q))) {
                return std::string("has no attention without flash attention for K in ") + ggml_type_name(asked_k) +
                    " at head_dim " + std::to_string(shape.n_embd_head_k);
            }
            continue;
        }
        ggml_tensor * mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n_kv, n_tokens, 1, 1);
        ggml_tensor * op   = llama_rq_attention(ctx, type_k, type_v, shape, n_kv, n_tokens, mask);
        if (!ggml_backend_dev_supports_op(dev, op)) {
            const std::string v_dim = shape.n_embd_head_v == shape.n_embd_head_k ? "" : "/" + std::to_string(shape.n_embd_head_v);
            return std::string("has no attention kernel for K in ") + ggml_type_name(asked_k) +
                (shape.v_in_k ? ", of which V is a view (MLA)," : std::string(" and V in ") + ggml_type_name(asked_v)) + " at head_dim " + std::to_string(shape.n_embd_head_k) + v_dim +
                (shape.softcap != 0.0f ? " with capped scores" : "") + " and " + std::to_string(shape.n_head/shape.n_head_kv) + " heads to a KV head";
        }
    }
    return "";
}

bool llama_rq_device_holds_recent(ggml_backend_dev_t dev, ggml_type type_k, ggml_type type_v, const llama_rq_shape & shape, int64_t n_kv) {
    const ggml_init_params params = { /*.mem_size =*/ 128*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true };
    const std::unique_ptr<ggml_context, decltype(&ggml_free)> held(ggml_init(params), ggml_free);
    ggml_context * ctx = held.get();

    const int64_t n_held = 33;

    const auto holds = [&](ggml_type type_k, ggml_type type_v, const llama_rq_shape & shape, int64_t n_tokens) {
        const int64_t n_all = GGML_PAD(n_kv + n_held + n_tokens, 256);
        ggml_tensor * masks = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_all, n_tokens);
        ggml_tensor * op    = llama_rq_attention(ctx, type_k, type_v, shape, n_kv, n_tokens, masks);
        op->src[3] = ggml_view_2d(ctx, masks, n_kv, n_tokens, masks->nb[1], 0);
        ggml_tensor * held  = llama_rq_cells(ctx, GGML_TYPE_F16, shape.n_embd_head_k, shape.n_head_kv, n_held);
        ggml_tensor * fresh = llama_rq_cells(ctx, GGML_TYPE_F32, shape.n_embd_head_k, shape.n_head_kv, n_tokens);
        ggml_rq_flash_attn_ext_add_recent(op, held, llama_rq_values(ctx, GGML_TYPE_F16, shape, held),
            ggml_view_2d(ctx, masks, n_all - n_kv, n_tokens, masks->nb[1], n_kv*masks->nb[0]), fresh, llama_rq_values(ctx, GGML_TYPE_F32, shape, fresh));
        return ggml_backend_dev_supports_op(dev, op);
    };
    // a backend that does not know of such rows may take the rest for an attention of its own, but not with types of ours
    const llama_rq_shape any = { 128, 128, 4, 1 };
    if (!holds(GGML_TYPE_ISO3, GGML_TYPE_ISO3, any, 1)) {
        return false;
    }
    return holds(type_k, type_v, shape, 1) && holds(type_k, type_v, shape, 512);
}
