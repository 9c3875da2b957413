#pragma once

// What a model's graph would compute, for drivers that look at it and run none of it.

#include "kv_driver.h"

#include "ggml.h"

#include <vector>

static bool see_node(ggml_tensor * t, bool ask, void * nodes) {
    if (ask) {
        ((std::vector<ggml_tensor *> *) nodes)->push_back(t);
    }
    return false;
}

// The nodes of the graph that decodes TOKENS of the text; argv: MODEL TEXT TYPE_K TYPE_V TOKENS. They are the context's, which the
// caller frees.
static llama_context * graph_of(int argc, char ** argv, std::vector<ggml_tensor *> & nodes) {
    if (argc != 6) {
        die("arguments: model text type_k type_v tokens");
    }
    load_model_and_text(argv[1], argv[2]);

    llama_context_params params = llama_context_default_params();
    params.n_ctx             = 256;
    params.type_k            = type_from_name(argv[3]);
    params.type_v            = type_from_name(argv[4]);
    params.flash_attn_type   = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.cb_eval           = see_node;
    params.cb_eval_user_data = &nodes;
    llama_context * ctx = llama_init_from_model(model, params);
    if (!ctx) {
        die("no context");
    }
    nodes.clear();
    if (llama_decode(ctx, llama_batch_get_one(text.data(), atoi(argv[5]))) != 0) {
        die("not decoded");
    }
    return ctx;
}
