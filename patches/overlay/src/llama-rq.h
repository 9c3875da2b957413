#pragma once

#include "llama.h"

#include <functional>
#include <initializer_list>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

struct ggml_cgraph;
struct ggml_context;
struct ggml_tensor;
struct llama_hparams;
struct llama_model;
struct llama_rq_means;

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

// What a KV cache keeps of its types: the rotations (null where no type is ours), the types of layers that are named
// apart (LLAMA_RQ_LAYERS), and the means that are subtracted from K (LLAMA_RQ_CALIB). A rotation is that of the first
// of our types, the cache's own type first, and holds for all layers: those of other types store rotated values, too.
struct llama_rq_cache {
    std::shared_ptr<const llama_rq_rotation> k;
    std::shared_ptr<const llama_rq_rotation> v;

    std::pair<ggml_type, ggml_type> base; // types of K and V

    std::unordered_map<int32_t, std::pair<ggml_type, ggml_type>> layers; // those that differ, by layer of the model

    std::shared_ptr<const llama_rq_means> means;

    // throws std::runtime_error with a sentence; filter and name_tag as in the constructor of llama_kv_cache
    llama_rq_cache(const llama_model & model, const llama_hparams & hparams, ggml_type type_k, ggml_type type_v,
            bool offload, const std::function<bool(int32_t il)> & filter, const char * name_tag);

    // for a cache that shares the tensors of other: the same rotations, no layers or means of its own
    llama_rq_cache(const llama_rq_cache & other, ggml_type type_k, ggml_type type_v) :
        k(other.k), v(other.v), base(type_k, type_v) {}

    // the types of K and V of a layer of the model
    std::pair<ggml_type, ggml_type> types(int32_t il) const;

    // upstream rotates by the type of the cache; with layers of other types the quantized ones decide
    void choose_upstream_rot(const llama_hparams & hparams, int n_embd_head_k, int n_embd_head_v, bool & rot_k, bool & rot_v) const;

    // K as it is stored, from rotated K [head_dim, n_head_kv, n], and back: without and with the means of its layer
    ggml_tensor * center  (ggml_context * ctx, ggml_tensor * k_cur, int32_t il) const;
    ggml_tensor * uncenter(ggml_context * ctx, ggml_tensor * k_cur, int32_t il) const;

    // for the K-shift: does the cache hold whole heads that RoPE cannot turn where they are, whatever their type?
    bool shift_whole_heads() const;

    // a state that was saved under another type, rotation or calibration would be read as noise: tag it and refuse
    void state_write(llama_io_write_i & io) const;
    void state_read (llama_io_read_i  & io) const; // throws std::runtime_error
};

// false, with the reason in the log, when the model cannot hold these cache types; turns flash attention on where it
// is left open and the type of V in some layer needs it
bool llama_rq_check(const llama_model & model, llama_context_params & params);

bool llama_rq_is_type(ggml_type type);

// is this tensor an input made by llama_rq_rotation::build_input ?
bool llama_rq_is_rotation(const ggml_tensor * rot);

// rotates each n values of cur; returns cur where rot is null
ggml_tensor * llama_rq_rotate(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * rot);

// Puts Q, K and V (null ones are passed over) into the graph before their rotations are, if rot is ours: with nothing but
// views between them, the rotations and stores of a layer can then be one launch (ggml-cuda/rq-fuse.h).
void llama_rq_expand(ggml_cgraph * gf, ggml_tensor * rot, std::initializer_list<ggml_tensor *> tensors);

// whole heads of a K cache for the K-shift: [head_dim, n_head_kv, n_cells]. Upstream views only the n_rot values that
// RoPE turns, which is neither whole blocks nor what the rotation mixes.
ggml_tensor * llama_rq_view_heads(ggml_context * ctx, ggml_tensor * k, int64_t n_embd_head, int64_t n_head_kv, int64_t n_cells);
