#include "llama-rq-tensors.h"

#include "ggml.h"
#include "ggml-backend.h"

#include <stdexcept>

ggml_tensor * llama_rq_tensors::add(ggml_backend_buffer_type_t buft, ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2) {
    auto & ctx = bufs[buft].first;
    if (!ctx) {
        ctx.reset(ggml_init({ /*.mem_size =*/ n_max*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true }));
    }
    return ggml_new_tensor_3d(ctx.get(), type, ne0, ne1, ne2);
}

ggml_tensor * llama_rq_tensors::add(ggml_backend_buffer_type_t buft, ggml_type type, std::vector<float> values, int64_t ne0, int64_t ne1) {
    GGML_ASSERT((int64_t) values.size() == ne0*ne1);

    ggml_tensor * res = add(buft, type, ne0, ne1);
    data.emplace_back(res, std::move(values));
    return res;
}

void llama_rq_tensors::allocate(ggml_backend_buffer_usage usage, bool no_alloc) {
    for (auto & [buft, held] : bufs) {
        auto & [ctx, buf] = held;
        if (no_alloc) {
            buf.reset(ggml_backend_buft_alloc_buffer(buft, 0));
            for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
                t->buffer = buf.get(); // as upstream does for K and V
            }
        } else {
            buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
        }
        if (!buf) {
            throw std::runtime_error("failed to allocate a buffer for what the rotated cache types need beside K and V");
        }
        ggml_backend_buffer_clear(buf.get(), 0);
        ggml_backend_buffer_set_usage(buf.get(), usage);
    }

    for (const auto & [t, values] : data) {
        if (no_alloc) {
            continue;
        }
        if (t->type == GGML_TYPE_F16) {
            std::vector<ggml_fp16_t> halves(values.size());
            ggml_fp32_to_fp16_row(values.data(), halves.data(), values.size());
            ggml_backend_tensor_set(t, halves.data(), 0, ggml_nbytes(t));
        } else {
            ggml_backend_tensor_set(t, values.data(), 0, ggml_nbytes(t));
        }
    }
    data.clear();
}

size_t llama_rq_tensors::n_bytes() const {
    size_t res = 0;
    for (const auto & [_, held] : bufs) {
        for (ggml_tensor * t = ggml_get_first_tensor(held.first.get()); t; t = ggml_get_next_tensor(held.first.get(), t)) {
            res += ggml_nbytes(t);
        }
    }
    return res;
}
