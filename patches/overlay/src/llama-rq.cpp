#include "llama-rq.h"
#include "llama-rq-layers.h"
#include "llama-rq-modes.h"
#include "llama-rq-moments.h"
#include "llama-rq-profile.h"
#include "llama-rq-recent.h"
#include "llama-rq-tensors.h"

#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-model.h"

#include "../ggml/src/ggml-rq-types.h"

#include "ggml.h"
#include "ggml-backend.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

// The layers of all caches of this process by their K: of a cache, a graph's attention sees no more than views.
struct llama_rq_registry {
    std::mutex mutex;

    std::unordered_map<const ggml_tensor *, llama_rq_layer *> layers;
};

static llama_rq_registry & llama_rq_known() {
    static llama_rq_registry registry;
    return registry;
}

static llama_rq_layer * llama_rq_find(const ggml_tensor * k) {
    auto & known = llama_rq_known();
    std::lock_guard<std::mutex> lock(known.mutex);

    const auto it = known.layers.find(k->view_src);
    return it == known.layers.end() ? nullptr : it->second;
}

static llama_rq_rotation llama_rq_choose(ggml_type type, bool is_v, const llama_model & model) {
    if (!ggml_rq_is_type(type)) {
        return { type, GGML_RQ_NONE, 0 };
    }
    if (llama_rq_turned_by_graph(model)) {
        const auto & hparams  = model.hparams;
        const auto   upstream = llama_rq_turn_of(GGML_TYPE_Q8_0, 0, 0, is_v ? hparams.n_embd_head_v() : hparams.n_embd_head_k(), is_v);
        const int    mode     = upstream.n > 0 ? GGML_RQ_HADAMARD : GGML_RQ_NONE;

        LLAMA_LOG_INFO("llama_rq: %s %s, rotation = %s, mode = %s\n", is_v ? "V" : "K", ggml_type_name(type), llama_rq_family_name(type), llama_rq_mode_name(mode));
        return { type, mode, upstream.n };
    }
    const llama_rq_rotation res = { type, llama_rq_mode(is_v), llama_rq_n(model.hparams, is_v) };

    LLAMA_LOG_INFO("llama_rq: %s %s, rotation = %s, mode = %s, n = %d\n", is_v ? "V" : "K",
            ggml_type_name(type), llama_rq_family_name(type), llama_rq_mode_name(res.mode), (int) res.n);

    return res;
}

// the hparams of a cache for K and V with heads filled up, on each side that has a type of ours or shares a cache that has
static std::shared_ptr<const llama_hparams> llama_rq_pad(const llama_model & model, const llama_hparams & hparams, ggml_type type_k, ggml_type type_v,
        const llama_rq_cache * shared) {
    const auto entries = llama_rq_entries();
    const bool pad_k = shared ? shared->rotates(false) : ggml_rq_is_type(llama_rq_rotating_type(type_k, entries, false));
    const bool pad_v = shared ? shared->rotates(true)  : ggml_rq_is_type(llama_rq_rotating_type(type_v, entries, true));

    if (&hparams != &model.hparams || (!pad_k && !pad_v)) {
        return std::shared_ptr<const llama_hparams>(std::shared_ptr<void>(), &hparams);
    }
    auto res = std::make_shared<llama_hparams>(hparams);
    const auto pad = [](const char * what, uint32_t & n) {
        if (llama_rq_padded(n) > n) {
            LLAMA_LOG_INFO("llama_rq: heads of %s of %u values are filled up to %d\n", what, n, (int) llama_rq_padded(n));
            n = llama_rq_padded(n);
        }
    };
    if (pad_k) {
        pad("K", res->n_embd_head_k_full);
        pad("K", res->n_embd_head_k_swa);
    }
    if (pad_v) {
        pad("V", res->n_embd_head_v_full);
        pad("V", res->n_embd_head_v_swa);
    }
    return res;
}

llama_rq_cache::llama_rq_cache(const llama_model & model, const llama_hparams & given, ggml_type & type_k, ggml_type type_v,
        bool offload, const llama_rq_cache * shared, const std::function<bool(int32_t il)> & filter) :
    model(model), padded(llama_rq_pad(model, given, type_k, type_v, shared)), hparams(*padded), offload(offload), by_graph(llama_rq_turned_by_graph(model)) {
    // a second cache beside the one for K and V, for the keys of an indexer, which its graph turns
    const bool indexer = &given != &model.hparams;
    if (indexer && ggml_rq_is_type(type_k)) {
        type_k = GGML_TYPE_F16;
    }
    base = { type_k, type_v };
    k    = { type_k, GGML_RQ_NONE, 0 };
    v    = { type_v, GGML_RQ_NONE, 0 };
    if (indexer) {
        return;
    }

    if (!shared) {
        counted = llama_rq_counted_layers(hparams, filter);
    }
    const auto entries = counted.empty() ? std::vector<llama_rq_entry>() : llama_rq_entries();

    k = llama_rq_choose(llama_rq_rotating_type(type_k, entries, false), false, model);
    v = llama_rq_choose(llama_rq_rotating_type(type_v, entries, true),  true,  model);

    types_by_layer = llama_rq_types_by_layer(hparams, entries, counted);

    active = ggml_rq_is_type(k.type) || ggml_rq_is_type(v.type) || !types_by_layer.empty();
    exact  = !counted.empty() && llama_rq_wished_recent() != std::make_pair(0u, 0u);
}

llama_rq_cache::~llama_rq_cache() {
    auto & known = llama_rq_known();
    std::lock_guard<std::mutex> lock(known.mutex);

    for (const auto & [_, layer] : layers) {
        known.layers.erase(layer.k);
    }
}

bool llama_rq_cache::rotates(bool is_v) const {
    return ggml_rq_is_type(is_v ? v.type : k.type);
}

uint32_t llama_rq_cache::n_embd_k(int32_t il, uint32_t n) const {
    return std::max(n, hparams.n_embd_k_gqa(il));
}

uint32_t llama_rq_cache::n_embd_v(int32_t il, uint32_t n) const {
    return std::max(n, hparams.n_embd_v_gqa(il)); // of all layers the most where V is transposed
}

std::pair<ggml_type, ggml_type> llama_rq_cache::asked(int32_t il) const {
    const auto it = types_by_layer.find(il);
    return it == types_by_layer.end() ? base : it->second;
}

std::pair<ggml_type, ggml_type> llama_rq_cache::types(int32_t il) const {
    const auto [type_k, type_v] = asked(il);
    return { ggml_rq_type_for_head(type_k, llama_rq_head(hparams, il, false)), ggml_rq_type_for_head(type_v, llama_rq_head(hparams, il, true)) };
}

void llama_rq_cache::add_layer(int32_t il, ggml_tensor * k, ggml_tensor * v, ggml_backend_buffer_type_t buft) {
    if (!active && !exact) {
        return;
    }
    llama_rq_layer & layer = layers[il];
    layer.k    = k;
    layer.v    = v;
    layer.buft = buft;

    layer.n_embd_head_out = model.hparams.n_embd_head_v(il);
    if (by_graph) {
        return;
    }
    auto & known = llama_rq_known();
    std::lock_guard<std::mutex> lock(known.mutex);
    known.layers[k] = &layer;
}

void llama_rq_cache::complete(const llama_kv_cells_vec & cells, bool flash_attn, uint32_t n_seq_max, bool & attn_rot_k, bool & attn_rot_v) {
    const bool has_type = ggml_rq_is_type(k.type) || ggml_rq_is_type(v.type);

    if (active) {
        attn_rot_k = attn_rot_k && by_graph;
        attn_rot_v = attn_rot_v && by_graph;

        if (has_type && ggml_rq_scale_kind() != GGML_RQ_SCALE_INNER) {
            LLAMA_LOG_INFO("llama_rq: scale = %s\n", ggml_rq_scale_name(ggml_rq_scale_kind()));
        }
        log_layers();

        weights = std::make_shared<llama_rq_tensors>(5*layers.size());
        add_rotations();
    }
    add_profile();
    if (weights) {
        weights->allocate(GGML_BACKEND_BUFFER_USAGE_WEIGHTS, hparams.no_alloc);
    }

    if (exact) {
        recent = llama_rq_make_recent(model, hparams, layers, cells, flash_attn, offload, n_seq_max);
    }
}

void llama_rq_cache::log_layers() const {
    std::string text_k;
    std::string text_v;
    for (size_t i = 0; i < counted.size(); ++i) {
        const int32_t il = counted[i];
        if (!layers.count(il)) {
            continue;
        }
        const auto [layer_k, layer_v] = asked(il);

        const std::string sep = (text_k.empty() ? "" : ", ") + std::to_string(i) + " ";
        text_k += sep + ggml_type_name(layer_k);
        text_v += sep + ggml_type_name(layer_v);
    }
    if (!types_by_layer.empty()) {
        LLAMA_LOG_INFO("llama_rq: K layers: %s\n", text_k.c_str());
        LLAMA_LOG_INFO("llama_rq: V layers: %s\n", text_v.c_str());
    }
}

llama_rq_turn llama_rq_cache::turn(int32_t il, bool is_v) const {
    const auto & rotation = is_v ? v : k;
    const auto [type_k, type_v] = asked(il);
    return llama_rq_turn_of(is_v ? type_v : type_k, rotation.mode, rotation.n, is_v ? hparams.n_embd_head_v(il) : hparams.n_embd_head_k(il), is_v);
}

void llama_rq_cache::add_rotations() {
    std::map<std::tuple<ggml_backend_buffer_type_t, int64_t, int32_t>, ggml_tensor *> made;

    const auto matrix = [&](ggml_backend_buffer_type_t buft, const llama_rq_turn & turn) -> ggml_tensor * {
        if (turn.n == 0) {
            return nullptr;
        }
        ggml_tensor *& res = made[{ buft, turn.n, turn.hint }];
        if (!res) {
            res = weights->add(buft, GGML_TYPE_F32, turn.matrix(), turn.n, turn.n);
            res->op_params[0] = turn.hint; // llama_rq_rotate hands it on
            ggml_format_name(res, "rq_rot_%x_%d", turn.hint, (int) turn.n);
        }
        return res;
    };

    for (auto & [il, layer] : layers) {
        layer.k_rot = matrix(layer.buft, turn(il, false));
        layer.v_rot = layer.v ? matrix(layer.buft, turn(il, true)) : layer.k_rot; // with MLA V is the first values of K
    }
}

// turn*maps, where maps are symmetric [n_head][n][n]
static std::vector<float> llama_rq_turned(const llama_rq_turn & turn, std::vector<float> maps, int64_t n) {
    turn.apply(maps.data(), maps.size()); // rows: map*turn, of which the transpose is meant
    for (size_t head = 0; head < maps.size(); head += n*n) {
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j < i; ++j) {
                std::swap(maps[head + i*n + j], maps[head + j*n + i]);
            }
        }
    }
    return maps;
}

// n_head matrices [n][n] as those [to][to] that leave what heads are filled up with as it is
static std::vector<float> llama_rq_padded_maps(const std::vector<float> & maps, int64_t n, int64_t to) {
    std::vector<float> res(maps.size()/(n*n)*to*to, 0.0f);
    for (size_t head = 0; head < maps.size()/(n*n); ++head) {
        for (int64_t i = 0; i < to; ++i) {
            float * row = res.data() + (head*to + i)*to;
            if (i < n) {
                std::copy_n(maps.data() + (head*n + i)*n, n, row);
            } else {
                row[i] = 1.0f;
            }
        }
    }
    return res;
}

void llama_rq_cache::add_profile() {
    const auto wish = llama_rq_wished_profile();
    const auto & path = wish.path;
    if (counted.empty() || hparams.no_alloc) { // no_alloc: the weights are not there either
        return;
    }
    const bool rotated = weights && ggml_rq_is_type(k.type);
    if (path.empty()) {
        const bool has_bias = std::any_of(counted.begin(), counted.end(), [&](int32_t il) { return model.layers[il].wk_b || model.layers[il].wqkv_b; });
        if (rotated && has_bias && !wish.asked) {
            LLAMA_LOG_WARN("llama_rq: this model adds a bias to K, and rotated types keep such keys badly without a profile: ggufrq calibrate makes one\n");
        }
        return;
    }
    if (!rotated) {
        if (wish.asked) {
            LLAMA_LOG_WARN("llama_rq: profile %s is not used: K has none of the rotated types\n", path.c_str());
        }
        return;
    }

    std::vector<int32_t> own;
    for (const int32_t il : counted) {
        if (layers.count(il)) {
            own.push_back(il);
        }
    }

    const auto profile = llama_rq_load_profile(wish, model, k, own);
    for (const auto & [il, from] : profile.layers) {
        llama_rq_layer & layer = layers.at(il);
        const int64_t n      = hparams.n_embd_head_k(il);
        const int64_t n_own  = model.hparams.n_embd_head_k(il);
        const int64_t n_head = hparams.n_head_kv(il);
        if (!from.k_mean.empty()) {
            std::vector<float> mean(n*n_head, 0.0f);
            for (int64_t head = 0; head < n_head; ++head) {
                std::copy_n(from.k_mean.data() + head*n_own, n_own, mean.data() + head*n);
            }
            layer.k_mean = weights->add(layer.buft, GGML_TYPE_F32, mean, mean.size());
            // named and shaped as a bias of K, which is split by heads as K is where several devices share a layer
            ggml_format_name(layer.k_mean, "blk.%d.attn_k.bias", il);
        }
        if (!from.k_map.empty()) {
            const auto how = turn(il, false);
            // rounding them costs a thousandth of what a quantized K loses, and they are read for every token
            const auto type = ggml_is_quantized(layer.k->type) ? GGML_TYPE_F16 : GGML_TYPE_F32;
            // named and shaped as the weights of K, for the same reason
            layer.k_map = weights->add(layer.buft, type, llama_rq_turned(how, llama_rq_padded_maps(from.k_map, n_own, n), n), n, n*n_head);
            layer.q_map = weights->add(layer.buft, type, llama_rq_turned(how, llama_rq_padded_maps(from.q_map, n_own, n), n), n, n*n_head);
            ggml_format_name(layer.k_map, "blk.%d.attn_k.weight", il);
            ggml_format_name(layer.q_map, "blk.%d.attn_k.weight", il);
        }
    }
    profile_hash = profile.hash;
}

const llama_rq_layer * llama_rq_cache::find(int32_t il) const {
    const auto it = layers.find(il);
    return it == layers.end() ? nullptr : &it->second;
}

// heads filled up with zeros to n values
static ggml_tensor * llama_rq_fill(ggml_context * ctx, ggml_tensor * cur, int64_t n) {
    if (cur->ne[0] >= n) {
        return cur;
    }
    if (cur->type != GGML_TYPE_F32) {
        cur = ggml_cast(ctx, cur, GGML_TYPE_F32);
    }
    return ggml_pad(ctx, cur, n - cur->ne[0], 0, 0, 0);
}

// rotates each n values of cur; returns cur where rot is null
static ggml_tensor * llama_rq_rotate(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * rot) {
    if (!rot) {
        return cur;
    }

    if (cur->type != GGML_TYPE_F32) {
        cur = ggml_cast(ctx, cur, GGML_TYPE_F32);
    } else if (!ggml_is_contiguous(cur)) {
        cur = ggml_cont(ctx, cur);
    }

    const int64_t n = rot->ne[0];

    ggml_tensor * res = ggml_mul_mat(ctx, rot, ggml_reshape_2d(ctx, cur, n, ggml_nelements(cur)/n));
    res->op_params[1] = rot->op_params[0]; // where ggml_mul_mat_set_hint puts it

    return ggml_reshape_4d(ctx, res, cur->ne[0], cur->ne[1], cur->ne[2], cur->ne[3]);
}

// the matrices of a layer by KV heads [n, n, 1, n_head_kv]
static ggml_tensor * llama_rq_by_head(ggml_context * ctx, ggml_tensor * map) {
    ggml_tensor * res = ggml_reshape_4d(ctx, map, map->ne[0], map->ne[0], 1, map->ne[1]/map->ne[0]);
    return ggml_set_name(res, "rq_map"); // llama-imatrix collects what is called blk.*
}

// these applied to cur [n, n_head, n_tokens], all heads of a group by the matrix of their KV head
static ggml_tensor * llama_rq_map(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * map) {
    const int64_t n = cur->ne[0], n_head = cur->ne[1], n_tokens = cur->ne[2], n_head_kv = map->ne[3];

    if (cur->type != GGML_TYPE_F32) {
        cur = ggml_cast(ctx, cur, GGML_TYPE_F32);
    } else if (!ggml_is_contiguous(cur)) {
        cur = ggml_cont(ctx, cur);
    }
    cur = ggml_permute(ctx, ggml_reshape_4d(ctx, cur, n, n_head/n_head_kv, n_head_kv, n_tokens), 0, 2, 3, 1);
    cur = ggml_mul_mat(ctx, map, cur); // [n, n_tokens, group, n_head_kv]
    ggml_prec_set_acc(cur, GGML_PREC_F32);
    cur->op_params[1] = GGML_RQ_HINT_MAP;
    return ggml_permute(ctx, ggml_reshape_3d(ctx, cur, n, n_tokens, n_head), 0, 2, 1, 3);
}

// head by head as set_rows wants it; a single head counts as contiguous whatever its stride
static ggml_tensor * llama_rq_packed(ggml_context * ctx, ggml_tensor * cur) {
    if (!ggml_is_contiguous(cur)) {
        cur = ggml_cont(ctx, cur);
    }
    return ggml_reshape_3d(ctx, cur, cur->ne[0], cur->ne[1], cur->ne[2]);
}

// [head_dim, n_head_kv] as K of a token
static ggml_tensor * llama_rq_mean(ggml_context * ctx, const llama_rq_layer & layer, const ggml_tensor * k) {
    return ggml_reshape_2d(ctx, layer.k_mean, k->ne[0], k->ne[1]);
}

static ggml_tensor * llama_rq_turn_k(ggml_context * ctx, ggml_tensor * k, const llama_rq_layer & layer) {
    if (layer.k_mean) {
        k = ggml_sub(ctx, k, llama_rq_mean(ctx, layer, k));
    }
    return layer.k_map ? llama_rq_packed(ctx, llama_rq_map(ctx, k, llama_rq_by_head(ctx, layer.k_map))) : llama_rq_rotate(ctx, k, layer.k_rot);
}

ggml_tensor * llama_rq_cache::store_k(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * k_idxs, int32_t il) {
    const auto it = layers.find(il);
    if (it == layers.end() || by_graph) {
        return k_cur;
    }
    k_cur = llama_rq_turn_k(ctx, llama_rq_fill(ctx, k_cur, hparams.n_embd_head_k(il)), it->second);
    it->second.fresh = { ctx, k_cur, nullptr, k_idxs };
    return k_cur;
}

ggml_tensor * llama_rq_cache::store_v(ggml_context * ctx, ggml_tensor * v_cur, int32_t il) {
    const auto it = layers.find(il);
    if (it == layers.end() || by_graph) {
        return v_cur;
    }
    v_cur = llama_rq_rotate(ctx, llama_rq_fill(ctx, v_cur, hparams.n_embd_head_v(il)), it->second.v_rot);
    it->second.fresh.v = v_cur;
    return v_cur;
}

// upstream's way turns n_rot values of a head in place: not what a rotation has mixed, and no blocks of ours
static bool llama_rq_shifts(const llama_rq_layer * layer) {
    return layer && (ggml_rq_is_type(layer->k->type) || layer->k_rot || layer->k_mean || layer->k_map);
}

// whole heads of all cells [head_dim, n_head_kv, n_cells]
static ggml_tensor * llama_rq_heads(ggml_context * ctx, ggml_tensor * k, int64_t n_embd_head) {
    return ggml_view_3d(ctx, k, n_embd_head, k->ne[0]/n_embd_head, k->ne[1]*k->ne[2], ggml_row_size(k->type, n_embd_head), k->nb[1], 0);
}

ggml_tensor * llama_rq_cache::load_k(ggml_context * ctx, int32_t il) const {
    const llama_rq_layer * layer = find(il);
    if (!llama_rq_shifts(layer)) {
        return nullptr;
    }
    ggml_tensor * k = ggml_cast(ctx, llama_rq_heads(ctx, layer->k, hparams.n_embd_head_k(il)), GGML_TYPE_F32);
    if (layer->k_map) { // undone by the transpose of q_map, since map and rotation are symmetric
        k = llama_rq_packed(ctx, llama_rq_map(ctx, k, ggml_cont(ctx, ggml_transpose(ctx, llama_rq_by_head(ctx, layer->q_map)))));
    } else {
        k = llama_rq_rotate(ctx, k, layer->k_rot);
    }

    if (layer->k_mean) {
        k = ggml_add(ctx, k, llama_rq_mean(ctx, *layer, k));
    }
    if (hparams.n_lora_kv == 0) {
        return k;
    }
    const int64_t n_rot = hparams.n_rot(il); // RoPE turns the last values of a head there
    return ggml_view_3d(ctx, k, n_rot, k->ne[1], k->ne[2], k->nb[1], k->nb[2], (model.hparams.n_embd_head_k(il) - n_rot)*k->nb[0]);
}

ggml_tensor * llama_rq_cache::restore_k(ggml_context * ctx, ggml_tensor * k, int32_t il) const {
    const llama_rq_layer * layer = find(il);
    if (!llama_rq_shifts(layer)) {
        return k;
    }
    if (k->ne[0] < hparams.n_embd_head_k(il)) { // RoPE in place of the view that load_k gave: the rest of the heads is beside it
        ggml_tensor * all = k->src[0]->src[0];
        const auto part = [&](int64_t first, int64_t n) {
            return ggml_view_3d(ctx, all, n, all->ne[1], all->ne[2], all->nb[1], all->nb[2], first*all->nb[0]);
        };
        const int64_t n_own = model.hparams.n_embd_head_k(il);
        k = ggml_concat(ctx, part(0, n_own - k->ne[0]), k, 0);
        k = n_own < all->ne[0] ? ggml_concat(ctx, k, part(n_own, all->ne[0] - n_own), 0) : k;
    }
    return ggml_cpy(ctx, llama_rq_turn_k(ctx, k, *layer), llama_rq_heads(ctx, layer->k, hparams.n_embd_head_k(il)));
}

void llama_rq_cache::forget(uint32_t strm) {
    if (recent) {
        recent->forget(strm);
    }
}

void llama_rq_cache::forget() {
    if (recent) {
        recent->forget();
    }
}

struct llama_rq_state_tag {
    uint32_t magic;
    uint32_t k; // n << 16 | type << 8 | mode, 0 for a type that is not ours
    uint32_t v;
    uint32_t profile; // 0 without; and the families of siblings
};

static llama_rq_state_tag llama_rq_make_state_tag(const llama_rq_rotation & k, const llama_rq_rotation & v, uint32_t profile) {
    const auto id = [](const llama_rq_rotation & r) {
        return ggml_rq_is_type(r.type) ? (uint32_t) r.n << 16 | (uint32_t) r.type << 8 | (uint32_t) r.mode : 0;
    };
    return { /*.magic =*/ 0x33515247, /*.k =*/ id(k), /*.v =*/ id(v), /*.profile =*/ profile }; // "GRQ3"
}

// upstream itself compares the type of each layer, but siblings of 64 values have lost the family that they were asked for by
uint32_t llama_rq_cache::families() const {
    uint32_t res = 0;
    for (const auto & [il, _] : layers) {
        const auto by_name = asked(il);
        if (by_name != types(il)) {
            res = (res ^ (uint32_t) il << 16 ^ (uint32_t) by_name.first << 8 ^ (uint32_t) by_name.second)*0x01000193u;
        }
    }
    return res;
}

void llama_rq_cache::state_write(llama_io_write_i & io) const {
    if (active) {
        const auto tag = llama_rq_make_state_tag(k, v, profile_hash ^ families());
        io.write(&tag, sizeof(tag));
    }
}

void llama_rq_cache::state_read(llama_io_read_i & io) {
    if (active) {
        const auto want = llama_rq_make_state_tag(k, v, profile_hash ^ families());

        llama_rq_state_tag tag;
        io.read(&tag, sizeof(tag));
        if (memcmp(&tag, &want, sizeof(tag)) != 0) {
            throw std::runtime_error("the state was saved with another cache type, rotation mode or profile");
        }
    }
    forget();
}

ggml_tensor * llama_rq_query(const llm_graph_context & graph, ggml_tensor * q, const ggml_tensor * k) {
    if (llama_rq_sums_moments()) {
        llama_rq_add_moments(graph, q, k);
    }
    const llama_rq_layer * layer = llama_rq_find(k);
    if (!layer) {
        return q;
    }
    q = llama_rq_fill(graph.ctx0, q, k->ne[0]);
    return layer->q_map ? llama_rq_map(graph.ctx0, q, llama_rq_by_head(graph.ctx0, layer->q_map)) : llama_rq_rotate(graph.ctx0, q, layer->k_rot);
}

ggml_tensor * llama_rq_output(const llm_graph_context & graph, ggml_tensor * attn, ggml_tensor * kq_mask) {
    llama_rq_layer * layer = llama_rq_find(attn->src[1]);
    if (!layer) {
        return attn;
    }
    ggml_tensor * out = llama_rq_rotate(graph.ctx0, attn, layer->v_rot);
    if (layer->recent && layer->fresh.ctx == graph.ctx0 && (layer->fresh.v || !layer->v) && !graph.cparams.training) {
        llama_rq_attend_recent(graph, attn, out, kq_mask, *layer);
    }
    if (layer->v && out->ne[0] > layer->n_embd_head_out) {
        out = ggml_cont(graph.ctx0, ggml_view_4d(graph.ctx0, out, layer->n_embd_head_out, out->ne[1], out->ne[2], out->ne[3], out->nb[1], out->nb[2], out->nb[3], 0));
    }
    return out;
}
