#pragma once

#include "llama.h"

#include <memory>
#include <vector>

struct ggml_context;
struct ggml_tensor;
struct llama_hparams;

class llama_io_write_i;
class llama_io_read_i;

// Rotated KV cache types (planar, iso, rotor): the rotation that the graph applies to Q and K, or to V and the
// attention's output. It takes the place of upstream's Hadamard matrix in the same graph inputs and, like it, is
// symmetric and its own inverse.
struct llama_rq_rotation {
    ggml_type          type; // the cache type
    int                mode; // enum ggml_rq_mode
    int64_t            n;    // the rotation is n x n, applied to each n values of a head
    std::vector<float> data; // empty when the mode is none

    // the graph input, or nullptr when there is no rotation
    ggml_tensor * build_input(ggml_context * ctx, const char * name) const;

    void set_input(ggml_tensor * dst) const;
};

// what a KV cache keeps of its types; null for a type that is not ours
struct llama_rq_cache {
    std::shared_ptr<const llama_rq_rotation> k;
    std::shared_ptr<const llama_rq_rotation> v;

    llama_rq_cache() = default;
    llama_rq_cache(ggml_type type_k, ggml_type type_v);

    // a state that was saved under another type or rotation would be read as noise: tag it and refuse
    void state_write(llama_io_write_i & io) const;
    void state_read (llama_io_read_i  & io) const; // throws std::runtime_error
};

// false, with the reason in the log, when the model cannot hold these cache types
bool llama_rq_check(const llama_hparams & hparams, ggml_type type_k, ggml_type type_v);

bool llama_rq_is_type(ggml_type type);

// is this tensor an input made by llama_rq_rotation::build_input ?
bool llama_rq_is_rotation(const ggml_tensor * rot);

// rotates each n values of cur; returns cur where rot is null
ggml_tensor * llama_rq_rotate(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * rot);

// whole heads of a K cache for the K-shift: [head_dim, n_head_kv, n_cells]. Upstream views only the n_rot values that
// RoPE turns, which is neither whole blocks nor what the rotation mixes.
ggml_tensor * llama_rq_view_heads(ggml_context * ctx, ggml_tensor * k, int64_t n_embd_head, int64_t n_head_kv, int64_t n_cells);
