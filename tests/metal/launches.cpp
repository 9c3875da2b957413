// The kernels that a model's graph takes on Metal, none of which is run: launches MODEL TEXT TYPE_K TYPE_V TOKENS
//
// Prints a JSON list of their names. The graph is planned for the CPU, in the order that upstream's Metal backend would give it.

#include "device.h"
#include "ggml-metal-common.h"

#include "kv_driver.h"

static std::vector<ggml_tensor *> nodes;

static bool see(ggml_tensor * t, bool ask, void *) {
    if (ask) {
        nodes.push_back(t);
    }
    return false;
}

int main(int argc, char ** argv) {
    if (argc != 6) {
        die("arguments: model text type_k type_v tokens");
    }
    load_model_and_text(argv[1], argv[2]);

    llama_context_params params = llama_context_default_params();
    params.n_ctx           = 256;
    params.type_k          = type_from_name(argv[3]);
    params.type_v          = type_from_name(argv[4]);
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.cb_eval         = see;
    llama_context * ctx = llama_init_from_model(model, params);
    if (!ctx) {
        die("no context");
    }
    nodes.clear();
    if (llama_decode(ctx, llama_batch_get_one(text.data(), atoi(argv[5]))) != 0) {
        die("not decoded");
    }

    ggml_context * meta  = ggml_init({ ggml_graph_overhead_custom(nodes.size() + 1, false), nullptr, true });
    ggml_cgraph  * graph = ggml_new_graph_custom(meta, nodes.size() + 1, false);
    for (ggml_tensor * t : nodes) {
        ggml_build_forward_expand(graph, t);
    }
    ggml_graph_optimize(graph);

    fake_metal_dry_run(true);
    fake_metal_compute(graph);

    const char * separator = "[";
    for (const auto & name : fake_metal_launched()) {
        printf("%s\"%s\"", separator, name.c_str());
        separator = ", ";
    }
    printf("]\n");

    ggml_free(meta);
    llama_free(ctx);
    llama_model_free(model);
}
