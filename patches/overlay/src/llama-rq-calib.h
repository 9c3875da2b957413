#pragma once

#include "llama-rq.h"

#include <map>
#include <string>
#include <vector>

// Means of K that are taken off before K is stored. A constant added to every key of a head changes all scores of a
// query by the same amount, which softmax takes out again, so that nothing has to be added back.
struct llama_rq_means {
    std::map<int32_t, std::vector<float>> k; // by layer of the model: [head_dim*n_head_kv], of K before its rotation

    uint32_t hash; // of all means
};

// the means for these layers of the model from the calibration file, which keeps them rotated; throws std::runtime_error with
// a sentence when the file is damaged, of another model or rotation, or when the model's attention is not a plain softmax
llama_rq_means llama_rq_load_means(const std::string & path, const llama_model & model, const llama_rq_rotation & rotation,
        const std::vector<int32_t> & layers);
