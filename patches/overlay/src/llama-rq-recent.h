#pragma once

#include "llama-kv-cache.h"

#include <memory>
#include <unordered_map>
#include <vector>

struct llama_rq_cache;

// The newest tokens of each sequence in f16, beside a cache of rotated types (LLAMA_RQ_RECENT=N).
//
// A query at position p sees the key and the value at position q as they were before quantization, iff 0 <= p - q < N
// and they are held; all others it sees as the cache stores them, which is every token from the first on. What is held
// are rows of f16 tensors, N for each sequence that the cache may hold, and a table that says of which cell and
// position a row is. A row whose cell has been written since, is free or has another position by now is not used, and
// where none is held the query sees the cache: always right, only less exact. So after a K-shift, in a restored
// state and in a copied stream the newest tokens are held again only as they come.
//
// Within a batch, keys and values are still at hand as they were computed: attention reads them and the rows that were
// held before it, then the rows are written. What a query sees hence does not depend on how a text is cut into batches.
class llama_rq_recent {
public:
    llama_rq_recent(std::shared_ptr<const llama_rq_cache> rq, const llama_kv_cells_vec & cells, uint32_t n_tokens, uint32_t n_rows,
            uint32_t n_seq_max) : rq(std::move(rq)), cells(cells), n_tokens(n_tokens), n_rows(n_rows), n_seq_max(n_seq_max), tables(cells.size()) {}

    // rows for a layer of the cache, beside its K and V [n_embd_gqa, n_cells, n_stream]
    void add_layer(ggml_context * ctx, const ggml_tensor * k, const ggml_tensor * v);

    void log_size() const;

    // these cells are about to be written; the last such call before a graph is computed is for its ubatch
    void written(const llama_kv_cache::slot_info & sinfo);

    // all rows of a stream, or of all streams, are of cells that have been written otherwise
    void forget(uint32_t strm);
    void forget();

private:
    friend class llm_graph_input_rq_recent;

    struct layer_rows {
        ggml_tensor * k; // f16 [n_embd_gqa, n_rows + 1, n_stream], the last row is for tokens that are not held
        ggml_tensor * v;
    };

    struct row {
        int32_t   cell = -1;
        llama_pos pos  = -1;
    };

    const std::shared_ptr<const llama_rq_cache> rq;

    const llama_kv_cells_vec & cells;

    const uint32_t n_tokens;  // the N of the above
    const uint32_t n_rows;    // of a stream
    const uint32_t n_seq_max;

    std::unordered_map<const ggml_tensor *, layer_rows> layers; // by the layer's K in the cache

    std::vector<std::vector<row>> tables; // [n_stream][n_rows], of which the used ones

    llama_kv_cache::slot_info ubatch_cells;

    bool is_held(uint32_t strm, const row & r) const;

    // assigns rows to tokens that have just been stored in these cells of a stream; dst: for each the row in all streams
    void hold(uint32_t strm, const std::vector<uint32_t> & idxs, int64_t * dst);
};

// null when LLAMA_RQ_RECENT is 0 or not set, or with the reason in the log when the cache or its attention cannot do it
std::shared_ptr<llama_rq_recent> llama_rq_make_recent(const llama_model & model, const llama_hparams & hparams,
        std::shared_ptr<const llama_rq_cache> rq, const llama_kv_cells_vec & cells, bool flash_attn, bool offload,
        const std::function<bool(int32_t il)> & filter, const char * name_tag, uint32_t kv_size, uint32_t n_seq_max);

// LLAMA_RQ_RECENT; throws std::runtime_error with a sentence
uint32_t llama_rq_recent_tokens();

// In the graph of a layer, before its attention: k is its view of the cache, k_cur and v_cur what this ubatch has stored
// there (null where it reads the cache of another layer), rotated.
void llama_rq_recent_prepare(const llm_graph_context & graph, const llama_kv_cache_context * mctx, ggml_tensor * kq_mask,
        const ggml_tensor * k, ggml_tensor * k_cur, ggml_tensor * v_cur, const ggml_tensor * kq_b, int il);

// attn, the layer's FLASH_ATTN_EXT, gets what was prepared under the same mask, if anything, and joins the graph
void llama_rq_recent_attend(const llm_graph_context & graph, const ggml_tensor * kq_mask, ggml_tensor * attn);
