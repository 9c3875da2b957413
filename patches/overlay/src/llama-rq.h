#pragma once

#include "llama.h"

#include "llama-kv-cells.h"

#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

struct ggml_context;
struct ggml_tensor;
struct llama_hparams;
struct llama_model;
struct llm_graph_context;

class llama_io_write_i;
class llama_io_read_i;
class llama_rq_recent;

using llama_kv_cells_vec = std::vector<llama_kv_cells>;

// Rotated KV cache types (planar, iso, rotor). K and V are turned by an orthogonal matrix where they go into the cache; the
// queries and the attention's output are turned where it is read, so that all else in a graph sees plain tensors.

// What is done to K and V of a layer before they are stored
struct llama_rq_layer {
    ggml_tensor * k; // in the cache
    ggml_tensor * v; // null with MLA

    ggml_backend_buffer_type_t buft;

    // f32 [n, n], symmetric and its own inverse, for each n values of a head; null: they are stored as they are
    ggml_tensor * k_rot = nullptr;
    ggml_tensor * v_rot = nullptr;

    // f32 [head_dim*n_head_kv], taken off K before all else; null: nothing is
    ggml_tensor * k_mean = nullptr;

    // f32 [head_dim, head_dim, n_head_kv], of K and of the queries, with the rotation in it, in place of k_rot; null: that alone
    ggml_tensor * k_map = nullptr;
    ggml_tensor * q_map = nullptr;

    // values of a head of the attention's output; those of V may be filled up to more
    int64_t n_embd_head_out = 0;

    // the newest tokens in f16 (llama-rq-recent.h), null without
    llama_rq_recent * recent = nullptr;

    // what goes into the cache, in the graph of this context
    struct {
        const ggml_context * ctx = nullptr;

        ggml_tensor * k      = nullptr; // [head_dim, n_head_kv, n_tokens]
        ggml_tensor * v      = nullptr;
        ggml_tensor * k_idxs = nullptr; // [n_tokens]
    } fresh;
};

// Which rotation a cache has for K or V: that of the first of our types, the cache's own type first
struct llama_rq_rotation {
    ggml_type type; // not one of ours: there is none
    int       mode; // enum ggml_rq_mode
    int64_t   n;    // values that are rotated together
};

// What a KV cache with rotated types, with types by layer or with tokens in f16 has beside K and V. Without these it does nothing.
class llama_rq_cache {
public:
    // hparams, types and filter as in the constructor of llama_kv_cache; shared: of the cache whose layers this one has, null without
    // type_k becomes f16 in the cache of an indexer, which hparams of its own tell; throws std::runtime_error with a sentence
    llama_rq_cache(const llama_model & model, const llama_hparams & hparams, ggml_type & type_k, ggml_type type_v,
            bool offload, const llama_rq_cache * shared, const std::function<bool(int32_t il)> & filter);
    ~llama_rq_cache();

    // the cache's hparams with heads as they are kept: filled up to a multiple of 64 where K or V has a type of ours
    const llama_hparams & kept() const { return hparams; }

    // whether K or V has a type of ours in some layer
    bool rotates(bool is_v) const;

    // values of K or V of a token in a layer, of which there are n without filling up
    uint32_t n_embd_k(int32_t il, uint32_t n) const;
    uint32_t n_embd_v(int32_t il, uint32_t n) const;

    // the types that K and V of a layer of the model are stored in: as they were asked for, or siblings of 64 values
    std::pair<ggml_type, ggml_type> types(int32_t il) const;

    void add_layer(int32_t il, ggml_tensor * k, ggml_tensor * v, ggml_backend_buffer_type_t buft);

    // after the last layer: rotations, profile (LLAMA_RQ_PROFILE), newest tokens (LLAMA_RQ_RECENT); takes upstream's rotation over
    void complete(const llama_kv_cells_vec & cells, bool flash_attn, uint32_t n_seq_max, bool & attn_rot_k, bool & attn_rot_v);

    // K and V as they are stored; k_cur [head_dim, n_head_kv, n_tokens]
    ggml_tensor * store_k(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * k_idxs, int32_t il);
    ggml_tensor * store_v(ggml_context * ctx, ggml_tensor * v_cur, int32_t il);

    // For the K-shift: all K of a layer as RoPE had left it, f32 [head_dim, n_head_kv, n_cells], and where RoPE has turned it, back
    // into the cache. Upstream turns K where it is, and views only the values that RoPE turns: load gives null where that will do.
    ggml_tensor * load_k   (ggml_context * ctx, int32_t il) const;
    ggml_tensor * restore_k(ggml_context * ctx, ggml_tensor * k, int32_t il) const;

    // the cells of a stream, or of all, have been written otherwise than by a graph
    void forget(uint32_t strm);
    void forget();

    // a state that was saved under another type, rotation or profile would be read as noise: tag it and refuse
    void state_write(llama_io_write_i & io) const;
    void state_read (llama_io_read_i  & io); // throws std::runtime_error

private:
    const llama_model & model;

    const std::shared_ptr<const llama_hparams> padded;
    const llama_hparams & hparams;

    const bool offload;

    const bool by_graph; // the graph turns Q, K and V itself, as upstream's types: the K-shift alone is left

    bool active = false; // anything is turned, or layers differ
    bool exact  = false; // the newest or the first tokens are asked for in f16

    std::pair<ggml_type, ggml_type> base; // types of K and V

    std::map<int32_t, std::pair<ggml_type, ggml_type>> types_by_layer; // those that differ

    std::vector<int32_t> counted; // layers of the model that LLAMA_RQ_LAYERS counts, of this cache and of its twin

    llama_rq_rotation k;
    llama_rq_rotation v;

    std::map<int32_t, llama_rq_layer> layers; // of this cache

    std::shared_ptr<class llama_rq_tensors> weights; // rotations and profile
    std::shared_ptr<llama_rq_recent>        recent;

    uint32_t profile_hash = 0; // 0 without

    const llama_rq_layer * find(int32_t il) const;

    std::pair<ggml_type, ggml_type> asked(int32_t il) const; // the types of a layer by their names (LLAMA_RQ_LAYERS)
    uint32_t families() const; // a hash of them where the stored types do not tell, 0 where they do

    struct llama_rq_turn turn(int32_t il, bool is_v) const;

    void log_layers() const;
    void add_rotations();
    void add_profile();
};

// false, with the reason in the log, when the model cannot hold these cache types; turns flash attention on where it
// is left open and the type of V in some layer needs it
bool llama_rq_check(const llama_model & model, llama_context_params & params);

// what the heads of a model must be a multiple of for a type of this name
int64_t llama_rq_blck_size(ggml_type type);

// Attention in a graph: the queries for k as the cache gives it, and the result of a FLASH_ATTN_EXT, which also attends to
// the newest tokens. Both are passed through where k is no view of a cache in which anything is turned.
ggml_tensor * llama_rq_query (const llm_graph_context & graph, ggml_tensor * q, const ggml_tensor * k);
ggml_tensor * llama_rq_output(const llm_graph_context & graph, ggml_tensor * attn, ggml_tensor * kq_mask);
