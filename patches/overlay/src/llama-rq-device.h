#pragma once

#include "ggml-backend.h"
#include "ggml.h"

#include <string>

struct llama_hparams;

// the shape of a layer's attention
struct llama_rq_shape {
    int64_t n_embd_head_k;
    int64_t n_embd_head_v;
    int64_t n_head;
    int64_t n_head_kv;
    float   softcap = 0.0f;  // of the scores, 0 for none
    bool    v_in_k  = false; // V is the first values of K (MLA)

    static llama_rq_shape of(const llama_hparams & hparams, uint32_t il);

    // the type that K or V is stored in where this one is asked for
    ggml_type stored(ggml_type asked, bool is_v) const;
};

// Can a device be shown a tensor of this type? Not when it is behind an RPC server of another build. Such a server is sent views
// of the cache even where the cache and the attention are not on it.
bool llama_rq_device_knows(ggml_backend_dev_t dev, ggml_type type);

// What a device cannot do with a cache of these types, as they were asked for, as part of a sentence; empty if it can store rows and
// attend to them, in the blocks that the heads take.
// The scheduler would move such operations to the CPU without a word, or find no place for them and abort.
std::string llama_rq_device_lacks(ggml_backend_dev_t dev, ggml_type type_k, ggml_type type_v, const llama_rq_shape & shape, bool flash_attn);

// whether the device can attend to rows in f16 beside a cache of these types and so many cells (llama-rq-recent.h), with one token and with a prompt
bool llama_rq_device_holds_recent(ggml_backend_dev_t dev, ggml_type type_k, ggml_type type_v, const llama_rq_shape & shape, int64_t n_kv);
