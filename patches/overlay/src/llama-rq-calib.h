#pragma once

#include "llama-rq.h"

#include "ggml-cpp.h"

#include <string>

// Means of K that are subtracted before K is stored. A constant added to every key of a head changes all scores of a
// query by the same amount, which softmax takes out again, so that nothing has to be added back.
struct llama_rq_means {
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> bufs;

    std::unordered_map<int32_t, ggml_tensor *> k; // by layer of the model: f32 [head_dim*n_head_kv], rotated as K is

    uint32_t hash; // of all means
};

// the means for these layers of the model from the calibration file; throws std::runtime_error with a sentence when the
// file is damaged, of another model or rotation, or when the model's attention is not a plain softmax
std::shared_ptr<const llama_rq_means> llama_rq_load_means(const std::string & path, const llama_model & model, const std::string & rotation,
        const std::vector<int32_t> & layers, bool offload);
