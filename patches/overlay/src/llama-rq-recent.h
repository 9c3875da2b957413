#pragma once

#include "llama-rq.h"
#include "llama-rq-tensors.h"

#include "ggml-backend.h"

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

// The newest tokens of each sequence in f16, and the first ones, beside a quantized cache (LLAMA_RQ_RECENT=N, LLAMA_RQ_FIRST=S).
//
// A query at position p sees the key and the value at position q as they were before quantization, iff 0 <= p - q < N or
// q < S, and they are held; all others it sees as the cache stores them, which is every token from the first on. What is
// held are rows of f16 tensors, N + S for each sequence that the cache may hold, and a table that says of which cell and
// position a row is. A row whose cell has been written since, is free or has another position by now is not used, and
// where none is held the query sees the cache: always right, only less exact. So after a K-shift, in a restored
// state and in a copied stream the newest tokens are held again only as they come.
//
// Within a batch, keys and values are still at hand as they were computed: attention reads them and the rows that were
// held before it, then the rows are written. What a query sees hence does not depend on how a text is cut into batches.
class llama_rq_recent {
public:
    // makes rows for all layers and tells them of it; device: that attends over a layer, null for the CPU
    llama_rq_recent(std::map<int32_t, llama_rq_layer> & layers, const llama_kv_cells_vec & cells, uint32_t n_newest, uint32_t n_first,
            uint32_t n_seq_max, bool no_alloc, const std::function<ggml_backend_dev_t(int32_t il)> & device);

    // all rows of a stream, or of all streams, are of cells that have been written otherwise
    void forget(uint32_t strm);
    void forget();

private:
    friend class llm_graph_input_rq_recent;

    struct layer_rows {
        ggml_tensor * k; // f16 [n_embd_gqa, n_rows + 1, n_stream], the last row is for tokens that are not held
        ggml_tensor * v; // null with MLA: the first values of K

        ggml_backend_dev_t dev; // that attends to them; null for the CPU
    };

    struct row {
        int32_t   cell = -1;
        llama_pos pos  = -1;
    };

    const llama_kv_cells_vec & cells;

    const uint32_t n_newest; // the N and the S of the above
    const uint32_t n_first;
    const uint32_t n_seq_max;
    const uint32_t n_rows;    // of a stream

    llama_rq_tensors tensors;

    std::unordered_map<const llama_rq_layer *, layer_rows> rows;

    std::vector<std::vector<row>> tables; // [n_stream][n_rows], of which the used ones

    // whether a query so far behind (ahead, if negative) sees the token at this position exactly
    bool is_exact(llama_pos past, llama_pos pos) const;

    bool is_held(uint32_t strm, const row & r) const;

    // these cells of a stream are being written
    void overwritten(uint32_t strm, const std::vector<uint32_t> & idxs);

    // assigns rows to tokens that have just been stored in these cells of a stream; dst: for each the row in all streams
    void hold(uint32_t strm, const std::vector<uint32_t> & idxs, int64_t * dst);
};

// the N and the S of the above, 0 without; throws std::runtime_error with a sentence
std::pair<uint32_t, uint32_t> llama_rq_wished_recent();

// null when LLAMA_RQ_RECENT and LLAMA_RQ_FIRST are 0 or not set, or with the reason in the log when the cache or its attention cannot do it
std::shared_ptr<llama_rq_recent> llama_rq_make_recent(const llama_model & model, const llama_hparams & hparams,
        std::map<int32_t, llama_rq_layer> & layers, const llama_kv_cells_vec & cells, bool flash_attn, bool offload, uint32_t n_seq_max);

// attn, a FLASH_ATTN_EXT over this layer, attends to its newest tokens, too, and joins the graph with out, what is made of its result
void llama_rq_attend_recent(const llm_graph_context & graph, ggml_tensor * attn, ggml_tensor * out, ggml_tensor * kq_mask, llama_rq_layer & layer);
