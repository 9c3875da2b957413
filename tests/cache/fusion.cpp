// What the CUDA backend would run as one launch (ggml-cuda/rq-fuse.h) in the graph of a model:
// fusion MODEL TEXT TYPE_K TYPE_V TOKENS
//
// Prints for each launch of a rotation or a product with the matrices of a profile [these, stores, results that are written out,
// nodes that it stands for], for a mean that is taken off by itself the same as for a rotation alone, and for an attention that its output's rotation goes along with [0, 0, 0, nodes].

#include "ggml-cuda/rq-fuse.h"

#include "graph_nodes.h"

int main(int argc, char ** argv) {
    std::vector<ggml_tensor *> nodes;
    llama_context * ctx = graph_of(argc, argv, nodes);

    // the same nodes in the same order, in a graph that knows how often each is used
    ggml_context * meta  = ggml_init({ ggml_graph_overhead_custom(nodes.size() + 1, false), nullptr, true });
    ggml_cgraph  * graph = ggml_new_graph_custom(meta, nodes.size() + 1, false);
    for (ggml_tensor * t : nodes) {
        ggml_build_forward_expand(graph, t);
    }
    if (graph->n_nodes != (int) nodes.size() || !std::equal(nodes.begin(), nodes.end(), graph->nodes)) {
        die("not the same graph");
    }

    const char * sep = "";
    printf("[");
    for (int i = 0; i < graph->n_nodes; ++i) {
        int after = 0;
        if (graph->nodes[i]->op == GGML_OP_FLASH_ATTN_EXT && ggml_cuda_rq_rotation_of(graph, i, after)) {
            printf("%s[0, 0, 0, %d]", sep, after + 1);
            sep = ", ";
            i += after;
        }
        if (after > 0) {
            continue;
        }
        ggml_cuda_rq_fusion f = {};
        if (ggml_cuda_rq_begins(graph, i)) {
            f = ggml_cuda_rq_fuse(graph, i);
        }
        if (f.n_nodes == 0) {
            // what is left of turning K, Q and V: a launch of its own
            const ggml_tensor * t = graph->nodes[i];
            const bool is_map  = t->op == GGML_OP_MUL_MAT && ggml_get_op_params_i32(t, 1) == GGML_RQ_HINT_MAP;
            const bool is_mean = ggml_cuda_rq_is_mean(t);
            if (!is_map && !is_mean && !ggml_cuda_rq_is_rotation(t)) {
                continue;
            }
            f = { { { graph->nodes[i], nullptr, true, is_map, nullptr, nullptr } }, 1, 1 };
        }
        int stores = 0;
        int kept   = 0;
        for (int j = 0; j < f.n; ++j) {
            stores += f.rotations[j].store != nullptr;
            kept   += f.rotations[j].keep;
        }
        printf("%s[%d, %d, %d, %d]", sep, f.n, stores, kept, f.n_nodes);
        sep = ", ";
        i += f.n_nodes - 1;
    }
    printf("]\n");

    ggml_free(meta);
    llama_free(ctx);
    llama_model_free(model);
}
