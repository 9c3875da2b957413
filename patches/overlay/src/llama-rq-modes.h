#pragma once

#include "llama-rq-layers.h"

#include "../ggml/src/ggml-rq-types.h"

#include <string>
#include <vector>

struct llama_hparams;
struct llama_model;

// The choices of LLAMA_RQ_MODE and LLAMA_ATTN_ROT_DISABLE

// the first of our types, that of the cache first; type where there is none
ggml_type llama_rq_rotating_type(ggml_type type, const std::vector<llama_rq_entry> & entries, bool is_v);

// LLAMA_ATTN_ROT_DISABLE turns off our rotations and upstream's
bool llama_rq_rotations_disabled();

// LLAMA_RQ_MODE=MODE or MODE_K/MODE_V; throws std::runtime_error with a sentence
ggml_rq_mode llama_rq_mode(bool is_v);

// values of a head as rotated types keep it: filled up with zeros to the next multiple of 64
int64_t llama_rq_padded(int64_t n_embd_head);

// What whole blocks and rotations have to make up: heads of K or V. Where V is the first values of K (MLA), both.
int64_t llama_rq_whole(int64_t n_embd_head_k, int64_t n_embd_head_v, bool v_in_k, bool is_v);

// the same for a layer, with heads as they are kept
int64_t llama_rq_head(const llama_hparams & hparams, uint32_t il, bool is_v);

// values that are rotated together: 256, 128 or 64, the most that the heads of all layers allow, which spreads outliers over more
int64_t llama_rq_n(const llama_hparams & hparams, bool is_v);

// whether the graph of this model turns Q, K and V itself, by upstream's matrices: it attends without build_attn_mha
bool llama_rq_turned_by_graph(const llama_model & model);

const char * llama_rq_family_name(ggml_type type);
const char * llama_rq_mode_name  (int mode);

// An orthogonal, symmetric matrix that each n values of a head are multiplied by; n is 0 where there is none
struct llama_rq_turn {
    int64_t n    = 0;
    int32_t hint = 0; // of a product with it (ggml-rq-types.h), or upstream's for a Hadamard matrix

    void apply(float * x, int64_t size) const; // to each n of size values, on the host

    std::vector<float> matrix() const; // n x n
};

// How K or V of a layer is turned. Our types do as their name says, and those of upstream that are quantized get upstream's
// Hadamard matrix, as they do without us: the largest that the heads allow for K, of 64 for V.
llama_rq_turn llama_rq_turn_of(ggml_type type, int mode, int64_t n, int64_t n_embd_head, bool is_v);

struct llama_rq_profile_wish {
    std::string path;          // empty: none
    bool        asked = false; // by name, instead of found beside the model
};

// LLAMA_RQ_PROFILE, a file or "none", or LLAMA_RQ_CALIB as it was called before; or else the file that was found (common/rq-args.h)
llama_rq_profile_wish llama_rq_wished_profile();
