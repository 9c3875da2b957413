#pragma once

// The rotated cache types on RPC devices. Upstream's client takes every server to support every operation. With our
// types that ends badly: a server of another build closes the connection when it sees one, one of this build aborts where
// its device lacks the kernel. So the server is asked, in a way that any server understands: what would a tensor with this
// mark take? Upstream's answers with a size, ours with yes or no. Such answers are kept.

#include "../ggml-rq-types.h"

#include "ggml-backend.h"
#include "ggml-impl.h"

#include <map>
#include <mutex>
#include <utility>

static constexpr int32_t GGML_RPC_RQ_QUESTION = 0x52510003; // the last digit: the version of the blocks and types

// sizes that no tensor has
static constexpr uint64_t GGML_RPC_RQ_YES = 0x5251000300000001;
static constexpr uint64_t GGML_RPC_RQ_NO  = 0x5251000300000000;

// server: the answer when the tensor is a question, 0 when it is none. The operation in question is its first source, those
// that follow are the operation's sources.
static uint64_t ggml_rpc_rq_answer(ggml_backend_t backend, const ggml_tensor * tensor) {
    if (tensor->op != GGML_OP_NONE || tensor->op_params[0] != GGML_RPC_RQ_QUESTION) {
        return 0;
    }
    ggml_tensor * op = tensor->src[0];
    for (int i = 0; op && i + 1 < GGML_MAX_SRC; i++) {
        op->src[i] = tensor->src[i + 1];
    }
    return !op || ggml_backend_supports_op(backend, op) ? GGML_RPC_RQ_YES : GGML_RPC_RQ_NO;
}

// K, V and mask of an attention over as many cells as a cache has at least: their number grows with every batch, and to ask
// anew would be to wait for the last one
static void ggml_rpc_rq_shorten(ggml_tensor & t, int src) {
    if (src == 1 || src == 2) {
        t.ne[1] = 256;
    } else if (src == 3) {
        t.ne[0] = 256;
        for (int i = 1; i < GGML_MAX_DIMS; i++) {
            t.nb[i] = t.ne[i - 1]*t.nb[i - 1];
        }
    }
}

// client: whether the server behind the device supports the operation; with nullptr, whether it knows our types
static bool ggml_rpc_rq_ask(ggml_backend_dev_t dev, const ggml_tensor * op) {
    ggml_tensor tensors[1 + GGML_MAX_SRC] = {};

    // a quantized type and a size that is not padded, or the client would not ask
    ggml_tensor & question = tensors[0];
    question.type  = GGML_TYPE_Q8_0;
    question.ne[0] = 32;
    question.nb[0] = ggml_type_size(question.type);
    for (int i = 1; i < GGML_MAX_DIMS; i++) {
        question.ne[i] = 1;
        question.nb[i] = question.nb[0];
    }
    question.op_params[0] = GGML_RPC_RQ_QUESTION;

    uint64_t hash = 0xcbf29ce484222325; // FNV-1a
    const auto mix = [&](const auto & values) {
        for (size_t i = 0; i < sizeof(values); i++) {
            hash = (hash ^ ((const uint8_t *) &values)[i]) * 0x100000001b3;
        }
    };
    for (int i = 0; op && i < GGML_MAX_SRC; i++) {
        const ggml_tensor * from = i == 0 ? op : op->src[i - 1];
        if (!from) {
            continue;
        }
        ggml_tensor & t = tensors[i + 1] = *from;
        t.buffer   = nullptr; // it need not be allocated yet, nor be on that server
        t.data     = nullptr;
        t.view_src = nullptr;
        if (op->op == GGML_OP_FLASH_ATTN_EXT) {
            ggml_rpc_rq_shorten(t, i - 1);
        }
        question.src[i] = &t;
        mix(i);
        mix(t.type);
        mix(t.op);
        mix(t.op_params);
        mix(t.ne);
        mix(t.nb);
    }
    // upstream's client keeps answers by the tensor without its sources
    question.op_params[1] = (int32_t) hash;
    question.op_params[2] = (int32_t) (hash >> 32);

    static std::mutex mutex;
    static std::map<std::pair<ggml_backend_dev_t, uint64_t>, bool> answers;

    std::lock_guard<std::mutex> lock(mutex);
    const auto [it, is_new] = answers.insert({ { dev, hash }, false });
    if (is_new) {
        it->second = ggml_backend_buft_get_alloc_size(ggml_backend_dev_buffer_type(dev), &question) == GGML_RPC_RQ_YES;
    }
    return it->second;
}

// client: true when upstream's answer does not do for this operation, with the right one in `supported`
static bool ggml_rpc_rq_decides(ggml_backend_dev_t dev, const ggml_tensor * op, bool & supported) {
    bool ours = ggml_rq_is_type(op->type) || ggml_rq_has_recent(op);
    for (int i = 0; i < GGML_MAX_SRC; i++) {
        ours = ours || (op->src[i] && ggml_rq_is_type(op->src[i]->type));
    }
    if (!ours) {
        return false;
    }
    // a question holds nine sources; attention that has more is not sent
    supported = !op->src[GGML_MAX_SRC - 1] && ggml_rpc_rq_ask(dev, nullptr) && (ggml_op_is_empty(op->op) || ggml_rpc_rq_ask(dev, op));
    return true;
}
