// The kernels that a model's graph takes on Metal, none of which is run: launches MODEL TEXT TYPE_K TYPE_V TOKENS
//
// Prints a JSON list of their names, in the order that upstream's Metal backend gives the nodes, with memory planned for that.

#include "device.h"
#include "ggml-alloc.h"
#include "ggml-metal-common.h"

#include "graph_nodes.h"

int main(int argc, char ** argv) {
    std::vector<ggml_tensor *> nodes;
    llama_context * ctx = graph_of(argc, argv, nodes);

    const size_t n = 2*nodes.size();
    ggml_context * meta  = ggml_init({ ggml_graph_overhead_custom(n, false) + n*ggml_tensor_overhead(), nullptr, true });
    ggml_cgraph  * graph = ggml_new_graph_custom(meta, n, false);
    ggml_tensor  * masks = nullptr;
    for (ggml_tensor * t : nodes) {
        if (ggml_rq_has_recent(t)) { // on a GPU both masks are parts of one tensor
            ggml_tensor *& mask = t->src[3];
            ggml_tensor *& more = t->src[GGML_RQ_RECENT_MASK];
            masks = masks ? masks : ggml_new_tensor_2d(meta, GGML_TYPE_F16, mask->ne[0] + more->ne[0], mask->ne[1]);
            more  = ggml_view_2d(meta, masks, more->ne[0], more->ne[1], masks->nb[1], mask->ne[0]*masks->nb[0]);
            mask  = ggml_view_2d(meta, masks, mask->ne[0], mask->ne[1], masks->nb[1], 0);
        }
        ggml_build_forward_expand(graph, t);
    }
    ggml_graph_optimize(graph);

    ggml_gallocr_t plan = ggml_gallocr_new(ggml_backend_cpu_buffer_type());
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        ggml_tensor * t = ggml_graph_node(graph, i);
        if ((t->view_src ? t->view_src : t)->op != GGML_OP_NONE) { // weights, caches and inputs stay where they are
            t->data   = nullptr;
            t->buffer = nullptr;
        }
    }
    if (!ggml_gallocr_alloc_graph(plan, graph)) {
        die("no plan");
    }

    fake_metal_dry_run(true);
    fake_metal_compute(graph);

    const char * separator = "[";
    for (const auto & name : fake_metal_launched()) {
        printf("%s\"%s\"", separator, name.c_str());
        separator = ", ";
    }
    printf("]\n");

    ggml_gallocr_free(plan);
    ggml_free(meta);
    llama_free(ctx);
    llama_model_free(model);
}
