#pragma once

#include "llama-rq-layers.h"

#include "../ggml/src/ggml-rq-types.h"

#include <string>
#include <vector>

struct llama_hparams;

// The choices of LLAMA_RQ_MODE, LLAMA_ATTN_ROT_DISABLE and LLAMA_RQ_SCALE

// the first of our types, that of the cache first; type where there is none
ggml_type llama_rq_rotating_type(ggml_type type, const std::vector<llama_rq_entry> & entries, bool is_v);

// LLAMA_ATTN_ROT_DISABLE turns off our rotations and upstream's
bool llama_rq_rotations_disabled();

// LLAMA_RQ_MODE=MODE or MODE_K/MODE_V; throws std::runtime_error with a sentence
ggml_rq_mode llama_rq_mode(bool is_v);

// values that are rotated together: 256 where the heads of all layers allow it, which spreads outliers over more
int64_t llama_rq_n(const llama_hparams & hparams, bool is_v);

const char * llama_rq_family_name(ggml_type type);
const char * llama_rq_mode_name  (int mode);

// n x n orthonormal Hadamard matrix, n a power of two
std::vector<float> llama_rq_hadamard(int64_t n);

// LLAMA_RQ_SCALE, which ggml-rq.c reads; "inner" when it is not set
std::string llama_rq_scale();
