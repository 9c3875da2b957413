#pragma once

#include "llama-rq-modes.h"
#include "llama-rq.h"

#include <cstdint>
#include <map>
#include <string>
#include <vector>

// The metric in which K of a layer is stored: with a mean m and a symmetric matrix A for each KV head, A*(k - m) takes the place
// of k and the queries are multiplied by the inverse of A. Scores change by q*m alone, which is the same for all keys of a
// query, so that softmax takes it out. A rotation comes on top of both.
struct llama_rq_profile {
    struct layer {
        std::vector<float> k_mean; // [n_head_kv][head_dim], of K behind RoPE; empty where there is none, or where it is not exact
        std::vector<float> k_map;  // [n_head_kv][head_dim][head_dim], A; empty in a file of means
        std::vector<float> q_map;  // the same, the inverse of A
    };

    std::map<int32_t, layer> layers; // by layer of the model

    uint32_t hash = 0; // of all that is used
};

// The profile for these layers of the model from a file, which ggufrq makes. Files of means alone (`ggufrq calibrate` of before)
// are read as well; they keep them rotated by `rotation`, that of K. Throws std::runtime_error with a sentence when the file is
// damaged or of another model, when the means of such a file are rotated otherwise, or are not exact in this model.
// For another model beside one of this process that the file is of, as a draft, and where it was only found, it is empty, with a line in the log.
llama_rq_profile llama_rq_load_profile(const llama_rq_profile_wish & wish, const llama_model & model, const llama_rq_rotation & rotation,
        const std::vector<int32_t> & layers);
