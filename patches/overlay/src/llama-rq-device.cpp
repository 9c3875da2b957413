#include "llama-rq-device.h"

#include "../ggml/src/ggml-rq-types.h"

#include <cmath>
#include <memory>

// [n_embd_head, n_kv, n_head_kv] as the cache gives it to the attention
static ggml_tensor * llama_rq_cells(ggml_context * ctx, ggml_type type, int64_t n_embd_head, int64_t n_head_kv, int64_t n_kv) {
    return ggml_permute(ctx, ggml_new_tensor_4d(ctx, type, n_embd_head, n_head_kv, n_kv, 1), 0, 2, 1, 3);
}

bool llama_rq_device_knows(ggml_backend_dev_t dev, ggml_type type) {
    const ggml_init_params params = { /*.mem_size =*/ ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true };
    const std::unique_ptr<ggml_context, decltype(&ggml_free)> held(ggml_init(params), ggml_free);

    return ggml_backend_dev_supports_op(dev, ggml_new_tensor_1d(held.get(), type, ggml_blck_size(type)));
}

std::string llama_rq_device_lacks(ggml_backend_dev_t dev, ggml_type asked_k, ggml_type asked_v, const llama_rq_shape & shape, bool flash_attn) {
    const ggml_type type_k = ggml_rq_type_for_head(asked_k, shape.n_embd_head_k);
    const ggml_type type_v = ggml_rq_type_for_head(asked_v, shape.n_embd_head_v);

    const ggml_init_params params = { /*.mem_size =*/ 64*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true };
    const std::unique_ptr<ggml_context, decltype(&ggml_free)> held(ggml_init(params), ggml_free);
    ggml_context * ctx = held.get();

    const int64_t n_kv = 256;

    for (const bool is_v : { false, true }) {
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
        ggml_tensor * k = llama_rq_cells(ctx, type_k, shape.n_embd_head_k, shape.n_head_kv, n_kv);
        ggml_tensor * v = llama_rq_cells(ctx, type_v, shape.n_embd_head_v, shape.n_head_kv, n_kv);
        ggml_tensor * q = ggml_permute(ctx, ggml_new_tensor_4d(ctx, GGML_TYPE_F32, shape.n_embd_head_k, shape.n_head, n_tokens, 1), 0, 2, 1, 3);
        if (!flash_attn) {
            if (!ggml_backend_dev_supports_op(dev, ggml_mul_mat(ctx, k, q))) {
                return std::string("has no attention without flash attention for K in ") + ggml_type_name(asked_k) +
                    " at head_dim " + std::to_string(shape.n_embd_head_k);
            }
            continue;
        }
        ggml_tensor * mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n_kv, n_tokens, 1, 1);
        ggml_tensor * op   = ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0f/std::sqrt((float) shape.n_embd_head_k), 0.0f, shape.softcap);
        if (!ggml_backend_dev_supports_op(dev, op)) {
            const std::string v_dim = shape.n_embd_head_v == shape.n_embd_head_k ? "" : "/" + std::to_string(shape.n_embd_head_v);
            return std::string("has no attention kernel for K in ") + ggml_type_name(asked_k) + " and V in " + ggml_type_name(asked_v) +
                " at head_dim " + std::to_string(shape.n_embd_head_k) + v_dim +
                (shape.softcap != 0.0f ? " with capped scores" : "") + " and " + std::to_string(shape.n_head/shape.n_head_kv) + " heads to a KV head";
        }
    }
    return "";
}
