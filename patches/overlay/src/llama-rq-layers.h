#pragma once

#include "ggml.h"

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

struct llama_hparams;

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

// Layers of the model that count as having a KV cache. Where two caches share the layers by their attention window,
// these are the layers of both; anywhere else the cache's own filter says it. Layers that only predict further tokens
// (MTP) are not counted, they keep the types of their cache.
std::vector<int32_t> llama_rq_counted_layers(const llama_hparams & hparams, const std::function<bool(int32_t il)> & filter);

// types of K and V of the layers that entries name, by layer of the model; throws std::runtime_error with a sentence where
// there is no such layer or its heads do not fill whole blocks
std::map<int32_t, std::pair<ggml_type, ggml_type>> llama_rq_types_by_layer(const llama_hparams & hparams,
        const std::vector<llama_rq_entry> & entries, const std::vector<int32_t> & counted);
