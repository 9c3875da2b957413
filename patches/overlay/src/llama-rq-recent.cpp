#include "llama-rq-recent.h"
#include "llama-rq-device.h"

#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "../ggml/src/ggml-rq-types.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <unordered_set>

static constexpr uint32_t LLAMA_RQ_RECENT_MAX = 4096;

// the number of tokens that an environment variable says; throws std::runtime_error with a sentence
static uint32_t llama_rq_n_tokens(const char * name) {
    const char * env = getenv(name);
    if (!env || !*env) {
        return 0;
    }

    const size_t n_digits = strspn(env, "0123456789");
    if (env[n_digits] || n_digits > 5 || atoi(env) > (int) LLAMA_RQ_RECENT_MAX) {
        throw std::runtime_error(std::string(name) + ": '" + env + "' is no number of tokens, use 0 to " + std::to_string(LLAMA_RQ_RECENT_MAX));
    }
    return atoi(env);
}

std::pair<uint32_t, uint32_t> llama_rq_wished_recent() {
    return { llama_rq_n_tokens("LLAMA_RQ_RECENT"), llama_rq_n_tokens("LLAMA_RQ_FIRST") };
}

// the device that computes attention over this layer, wherever its weights are; null for the CPU
static ggml_backend_dev_t llama_rq_attends_on(const llama_model & model, int32_t il, bool offload) {
    auto * dev = model.dev_layer(il);
    return !offload || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU ? nullptr : dev;
}

// why the newest tokens cannot be held; empty when they can
static std::string llama_rq_recent_refused(const llama_model & model, const llama_hparams & hparams,
        const std::map<int32_t, llama_rq_layer> & layers, bool flash_attn, bool offload) {
    const auto loses = [](const auto & entry) {
        const llama_rq_layer & layer = entry.second;
        return ggml_is_quantized(layer.k->type) || (layer.v && ggml_is_quantized(layer.v->type));
    };
    if (std::none_of(layers.begin(), layers.end(), loses)) {
        return "neither K nor V is quantized";
    }
    if (!flash_attn) {
        return "that takes flash attention, use -fa on";
    }
    if (hparams.n_rel_attn_bkts > 0) {
        return "this model adds a bias to the scores of attention";
    }
    if (hparams.indexer_head_size > 0) {
        return "this model's indexer chooses the keys, which the mask of the cache does not tell";
    }
    if (model.arch == LLM_ARCH_DFLASH) {
        return "this model stores K and V in graphs that do not attend to them";
    }
    // the name of a stored type as people know it
    const auto name = [](ggml_type type) {
        return ggml_rq_is_sibling(type) ? std::to_string(ggml_rq_type_bits(type)) + " bits" : std::string(ggml_type_name(type));
    };
    for (const auto & [il, layer] : layers) {
        auto * dev = llama_rq_attends_on(model, il, offload);
        if (!dev) {
            continue;
        }
        const std::string where = "layer " + std::to_string(il) + " is on " + ggml_backend_dev_name(dev) + ", ";
        if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
            return where + "split by heads among devices, which cannot attend to them so";
        }
        const llama_rq_shape shape = llama_rq_shape::of(hparams, il);
        const ggml_type    type_v = (layer.v ? layer.v : layer.k)->type; // with MLA V is the first values of K
        if (!llama_rq_device_holds_recent(dev, layer.k->type, type_v, shape, layer.k->ne[1])) {
            return where + "which cannot attend to them with K in " + name(layer.k->type) + " and V in " + name(type_v) +
                " at head_dim " + std::to_string(shape.n_embd_head_k);
        }
    }
    return "";
}

std::shared_ptr<llama_rq_recent> llama_rq_make_recent(const llama_model & model, const llama_hparams & hparams,
        std::map<int32_t, llama_rq_layer> & layers, const llama_kv_cells_vec & cells, bool flash_attn, bool offload, uint32_t n_seq_max) {
    const auto [n_newest, n_first] = llama_rq_wished_recent();
    if (n_newest + n_first == 0) {
        return nullptr;
    }

    const std::string why = llama_rq_recent_refused(model, hparams, layers, flash_attn, offload);
    if (!why.empty()) {
        LLAMA_LOG_WARN("llama_rq: the newest %u and first %u tokens are not held in f16: %s\n", n_newest, n_first, why.c_str());
        return nullptr;
    }

    return std::make_shared<llama_rq_recent>(layers, cells, n_newest, n_first, n_seq_max, hparams.no_alloc,
        [&](int32_t il) { return llama_rq_attends_on(model, il, offload); });
}

llama_rq_recent::llama_rq_recent(std::map<int32_t, llama_rq_layer> & layers, const llama_kv_cells_vec & cells, uint32_t n_newest, uint32_t n_first,
        uint32_t n_seq_max, bool no_alloc, const std::function<ggml_backend_dev_t(int32_t il)> & device) :
        cells(cells), n_newest(n_newest), n_first(n_first), n_seq_max(n_seq_max),
        n_rows(std::min(cells[0].size(), (n_newest + n_first)*n_seq_max/(uint32_t) cells.size())),
        tensors(2*layers.size()), tables(cells.size()) {
    for (auto & [il, layer] : layers) {
        const auto add = [&](const ggml_tensor * like) {
            ggml_tensor * res = tensors.add(layer.buft, GGML_TYPE_F16, like->ne[0], n_rows + 1, like->ne[2]);
            ggml_format_name(res, "%s (recent)", like->name);
            return res;
        };
        rows[&layer] = { add(layer.k), layer.v ? add(layer.v) : nullptr, device(il) };
        layer.recent = this;
    }
    tensors.allocate(GGML_BACKEND_BUFFER_USAGE_ANY, no_alloc);

    LLAMA_LOG_INFO("llama_rq: the newest %u and first %u tokens in f16: %u rows, %zu bytes\n", n_newest, n_first, (n_rows + 1)*(uint32_t) tables.size(), tensors.n_bytes());
}

void llama_rq_recent::forget(uint32_t strm) {
    tables[strm].clear();
}

void llama_rq_recent::forget() {
    for (auto & table : tables) {
        table.clear();
    }
}

void llama_rq_recent::overwritten(uint32_t strm, const std::vector<uint32_t> & idxs) {
    for (auto & r : tables[strm]) {
        if (std::find(idxs.begin(), idxs.end(), (uint32_t) r.cell) != idxs.end()) {
            r = {};
        }
    }
}

bool llama_rq_recent::is_exact(llama_pos past, llama_pos pos) const {
    return past >= 0 && (past < (llama_pos) n_newest || pos < (llama_pos) n_first);
}

bool llama_rq_recent::is_held(uint32_t strm, const row & r) const {
    return r.cell >= 0 && !cells[strm].is_empty(r.cell) && cells[strm].pos_get(r.cell) == r.pos;
}

void llama_rq_recent::hold(uint32_t strm, const std::vector<uint32_t> & idxs, int64_t * dst) {
    const auto & used = cells[strm];

    std::vector<std::pair<llama_seq_id, llama_pos>> newest;
    for (llama_seq_id seq = 0; seq < (llama_seq_id) n_seq_max; ++seq) {
        if (used.seq_pos_max(seq) >= 0) {
            newest.emplace_back(seq, used.seq_pos_max(seq));
        }
    }

    // how far a cell is behind the newest token, in the sequence in which it is least so; the first ones do not age
    const auto age = [&](uint32_t cell) {
        if (used.pos_get(cell) < (llama_pos) n_first) {
            return (llama_pos) 0;
        }
        llama_pos res = std::numeric_limits<llama_pos>::max();
        for (const auto & [seq, pos] : newest) {
            if (used.seq_has(cell, seq)) {
                res = std::min(res, pos - used.pos_get(cell));
            }
        }
        return res;
    };

    auto & table = tables[strm];
    table.resize(n_rows);

    std::vector<uint32_t> unused;
    std::vector<std::pair<llama_pos, uint32_t>> held; // age, row
    for (uint32_t i = 0; i < n_rows; ++i) {
        if (is_held(strm, table[i])) {
            held.emplace_back(age(table[i].cell), i);
        } else {
            unused.push_back(i);
        }
    }
    std::sort(held.begin(), held.end());

    std::vector<std::pair<llama_pos, uint32_t>> tokens; // age, index
    for (uint32_t i = 0; i < idxs.size(); ++i) {
        tokens.emplace_back(age(idxs[i]), i);
    }
    std::sort(tokens.begin(), tokens.end());

    for (const auto & [token_age, i] : tokens) {
        uint32_t to = n_rows;
        if (!is_exact(token_age, used.pos_get(idxs[i]))) {
            // no query will ever see it so
        } else if (!unused.empty()) {
            to = unused.back();
            unused.pop_back();
        } else if (!held.empty() && held.back().first > token_age) {
            to = held.back().second;
            held.pop_back();
        }
        if (to < n_rows) {
            table[to] = { (int32_t) idxs[i], used.pos_get(idxs[i]) };
        }
        dst[i] = (int64_t) strm*(n_rows + 1) + to;
    }
}

// The mask of the recent rows and where those of this ubatch go. It is set after the mask of the cache, from which it
// takes what it lets be seen: so it follows all that decides there, causality, windows, sequences and ALiBi. The graph puts both
// behind each other, once on each device, for backends that do so with K and V, whose kernels want whole rows of 256.
class llm_graph_input_rq_recent : public llm_graph_input_i {
public:
    llm_graph_input_rq_recent(llama_rq_recent & recent, ggml_context * ctx, ggml_tensor * kq_mask, const ggml_tensor * k_idxs) :
            recent(recent), kq_mask(kq_mask), k_idxs(k_idxs) {
        const int64_t n_kv = kq_mask->ne[0];
        mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, GGML_PAD(n_kv + recent.n_rows + kq_mask->ne[1], 256) - n_kv, kq_mask->ne[1], 1, kq_mask->ne[3]);
        ggml_set_input(mask);
        ggml_set_name(mask, "attn_inp_recent_mask");

        idxs = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, kq_mask->ne[1]*kq_mask->ne[3]);
        ggml_set_input(idxs);
        ggml_set_name(idxs, "attn_inp_recent_idxs");
    }

    void set_input(const llama_ubatch * ubatch) override;

    // the shapes follow from that of the mask of the cache, which upstream compares
    bool can_reuse(const llm_graph_params &) override { return true; }

    void attend(const llm_graph_context & graph, ggml_tensor * attn, ggml_tensor * out, const llama_rq_layer & layer);

    llama_rq_recent & recent;

    ggml_tensor * kq_mask; // F16 [n_kv, n_tokens/n_stream, 1, n_stream], of the cache

private:
    const ggml_tensor * k_idxs; // I64 [n_tokens], cells of all streams that this ubatch is stored in

    ggml_tensor * mask; // F16 [n_rows + n_tokens/n_stream or more, n_tokens/n_stream, 1, n_stream]
    ggml_tensor * idxs; // I64 [n_tokens]

    std::map<ggml_backend_dev_t, ggml_tensor *> masks; // both behind each other F16 [n_kv + that, ...], not for the CPU

    std::unordered_set<const llama_rq_layer *> stored; // layers whose rows this graph writes
};

void llm_graph_input_rq_recent::set_input(const llama_ubatch * ubatch) {
    GGML_ASSERT(ggml_backend_buffer_is_host(mask->buffer) && ggml_backend_buffer_is_host(idxs->buffer) && ggml_backend_buffer_is_host(k_idxs->buffer));
    GGML_ASSERT(kq_mask->type == GGML_TYPE_F16);

    const int64_t n_kv     = kq_mask->ne[0];
    const int64_t n_tps    = kq_mask->ne[1];
    const int64_t n_stream = kq_mask->ne[3];
    const int64_t n        = mask->ne[0];
    GGML_ASSERT(n_tps*n_stream == ubatch->n_tokens && k_idxs->ne[0] == ubatch->n_tokens);

    const ggml_fp16_t hidden = ggml_fp32_to_fp16(-INFINITY);
    std::fill((ggml_fp16_t *) mask->data, (ggml_fp16_t *) mask->data + ggml_nelements(mask), hidden);

    const int64_t kv_size = recent.cells[0].size();

    for (int64_t s = 0; s < n_stream; ++s) {
        const int64_t * dst  = (const int64_t *) k_idxs->data + s*n_tps;
        const uint32_t  strm = dst[0]/kv_size;

        std::vector<uint32_t> written(n_tps);
        for (int64_t i = 0; i < n_tps; ++i) {
            written[i] = dst[i] - strm*kv_size;
        }
        recent.overwritten(strm, written);

        struct column {
            uint32_t  i; // of the mask
            uint32_t  cell;
            llama_pos pos;
        };
        std::vector<column> columns;
        const auto & table = recent.tables[strm];
        for (uint32_t i = 0; i < table.size(); ++i) {
            if (recent.is_held(strm, table[i])) {
                columns.push_back({ i, (uint32_t) table[i].cell, table[i].pos });
            }
        }
        for (uint32_t i = 0; i < n_tps; ++i) {
            columns.push_back({ recent.n_rows + i, written[i], ubatch->pos[s*n_tps + i] });
        }

        for (int64_t i = s*n_tps; i < (s + 1)*n_tps; ++i) {
            ggml_fp16_t * cache = (ggml_fp16_t *) kq_mask->data + i*n_kv;
            ggml_fp16_t * rows  = (ggml_fp16_t *) mask->data    + i*n;
            for (const auto & c : columns) {
                if (recent.is_exact(ubatch->pos[i] - c.pos, c.pos)) {
                    rows[c.i]     = cache[c.cell];
                    cache[c.cell] = hidden;
                }
            }
        }

        recent.hold(strm, written, (int64_t *) idxs->data + s*n_tps);
    }
}

// the backend of a device in this graph; for null that of the CPU
static ggml_backend_t llama_rq_backend_of(const llm_graph_context & graph, ggml_backend_dev_t dev) {
    for (int i = 0; dev && i < ggml_backend_sched_get_n_backends(graph.sched); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(graph.sched, i);
        if (ggml_backend_get_device(backend) == dev) {
            return backend;
        }
    }
    return graph.backend_cpu;
}

void llm_graph_input_rq_recent::attend(const llm_graph_context & graph, ggml_tensor * attn, ggml_tensor * out, const llama_rq_layer & layer) {
    const auto & held = recent.rows.at(&layer);

    ggml_context * ctx = graph.ctx0;

    const int64_t n_tps    = kq_mask->ne[1];
    const int64_t n_stream = kq_mask->ne[3];

    const ggml_tensor * k = attn->src[1]; // a view of the cache, from its first stream in this ubatch on
    const uint32_t stream0 = k->view_offs/k->nb[3];

    // rows of the streams of this ubatch [n_embd_head, n_rows, n_head, n_stream]
    const auto view_held = [&](ggml_tensor * t, const ggml_tensor * like) {
        t = ggml_view_4d(ctx, t, like->ne[0], like->ne[1], recent.n_rows, n_stream,
                ggml_row_size(t->type, like->ne[0]), t->nb[1], t->nb[2], stream0*t->nb[2]);
        return ggml_permute(ctx, t, 0, 2, 1, 3);
    };
    // the same of a tensor [n_embd_head, n_head, n_tokens]
    const auto view_cur = [&](ggml_tensor * t) {
        t = ggml_view_4d(ctx, t, t->ne[0], t->ne[1], n_tps, n_stream, t->nb[1], t->nb[2], t->nb[2]*n_tps, 0);
        return ggml_permute(ctx, t, 0, 2, 1, 3);
    };
    // V where it is the first values of K (MLA)
    const auto of_k = [&](ggml_tensor * t) {
        return ggml_view_4d(ctx, t, attn->src[2]->ne[0], t->ne[1], t->ne[2], t->ne[3], t->nb[1], t->nb[2], t->nb[3], 0);
    };
    const auto & cur = layer.fresh;
    ggml_backend_t backend = llama_rq_backend_of(graph, held.dev);
    ggml_tensor *  more    = mask;
    if (held.dev) {
        ggml_tensor *& both = masks[held.dev];
        if (!both) {
            both = ggml_format_name(ggml_concat(ctx, kq_mask, mask, 0), "attn_recent_masks");
            ggml_backend_sched_set_tensor_backend(graph.sched, both, backend);
        }
        const auto columns = [&](int64_t n, int64_t first) {
            return ggml_view_4d(ctx, both, n, both->ne[1], 1, both->ne[3], both->nb[1], both->nb[2], both->nb[3], first*both->nb[0]);
        };
        attn->src[3] = columns(kq_mask->ne[0], 0);
        more         = columns(mask->ne[0], kq_mask->ne[0]);
    }
    ggml_tensor * k_held = view_held(held.k, cur.k);
    ggml_tensor * k_cur  = view_cur(cur.k);
    ggml_rq_flash_attn_ext_add_recent(attn, k_held, held.v ? view_held(held.v, cur.v) : of_k(k_held), more, k_cur, held.v ? view_cur(cur.v) : of_k(k_cur));
    if (!held.dev || ggml_backend_dev_supports_op(held.dev, attn)) {
        ggml_backend_sched_set_tensor_backend(graph.sched, attn, backend); // whatever others say of it
    }
    ggml_build_forward_expand(graph.gf, out);

    // after the attention, which reads the rows that are overwritten
    const auto store = [&](ggml_tensor * rows, ggml_tensor * t) {
        GGML_ASSERT(ggml_row_size(t->type, t->ne[0]) == t->nb[1]);
        rows = ggml_reshape_2d(ctx, rows, rows->ne[0], rows->ne[1]*rows->ne[2]);
        t    = ggml_view_2d(ctx, t, t->ne[0]*t->ne[1], t->ne[2], t->nb[2], 0);
        ggml_build_forward_expand(graph.gf, ggml_set_rows(ctx, rows, t, idxs));
    };
    if (stored.insert(&layer).second) {
        store(held.k, cur.k);
        if (held.v) {
            store(held.v, cur.v);
        }
    }
}

void llama_rq_attend_recent(const llm_graph_context & graph, ggml_tensor * attn, ggml_tensor * out, ggml_tensor * kq_mask, llama_rq_layer & layer) {
    for (const auto & input : graph.res->inputs) {
        auto * found = dynamic_cast<llm_graph_input_rq_recent *>(input.get());
        if (found && found->kq_mask == kq_mask && &found->recent == layer.recent) {
            found->attend(graph, attn, out, layer);
            return;
        }
    }
    auto * made = new llm_graph_input_rq_recent(*layer.recent, graph.ctx0, kq_mask, layer.fresh.k_idxs);
    graph.res->add_input(llm_graph_input_ptr(made));
    made->attend(graph, attn, out, layer);
}
