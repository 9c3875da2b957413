#pragma once

#include "ggml.h"

#include <string>
#include <vector>

// LLAMA_RQ_LAYERS: types of K and V for some layers, "0-1,-1:q8_0;5:iso4/iso3". Layers are those that have a KV cache,
// counted from 0, negative numbers from the end; the last entry that names a layer wins.
struct llama_rq_entry {
    struct range {
        int first;
        int last;
    };

    std::vector<range> layers;

    ggml_type type_k;
    ggml_type type_v;
};

// entries of the environment variable, none if it is not set; throws std::runtime_error with a sentence
std::vector<llama_rq_entry> llama_rq_entries();

// the layers of a range where there are n of them, ascending; throws std::runtime_error with a sentence
std::vector<int> llama_rq_indices(const llama_rq_entry::range & range, int n);
