#include "llama-rq.h"
#include "llama-rq-calib.h"
#include "llama-rq-device.h"
#include "llama-rq-layers.h"

#include "llama-impl.h"
#include "llama-io.h"
#include "llama-model.h"

#include "../ggml/src/ggml-rq-types.h"

#include "ggml.h"
#include "ggml-backend.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

static const char * const LLAMA_RQ_FAMILIES[] = { "planar", "iso", "rotor" };
static const char * const LLAMA_RQ_MODES[]    = { "none", "block", "hadamard", "full" };

static ggml_rq_mode llama_rq_mode_from_str(const std::string & s) {
    for (int i = 0; i < 4; ++i) {
        if (s == LLAMA_RQ_MODES[i]) {
            return (ggml_rq_mode) i;
        }
    }
    throw std::runtime_error("LLAMA_RQ_MODE: unknown rotation mode '" + s +
            "', use full, block, hadamard or none (K/V apart: full/block)");
}

// LLAMA_RQ_MODE=MODE or MODE_K/MODE_V; LLAMA_ATTN_ROT_DISABLE turns our rotations off, too
static ggml_rq_mode llama_rq_mode(bool is_v) {
    const char * disable = getenv("LLAMA_ATTN_ROT_DISABLE");
    if (disable && atoi(disable)) {
        return GGML_RQ_NONE;
    }

    const char * env = getenv("LLAMA_RQ_MODE");
    if (!env || !*env) {
        return GGML_RQ_FULL;
    }

    const std::string s = env;
    const size_t sep = s.find('/');
    if (sep == std::string::npos) {
        return llama_rq_mode_from_str(s);
    }
    return llama_rq_mode_from_str(is_v ? s.substr(sep + 1) : s.substr(0, sep));
}

// values that are rotated together: 256 where the heads of all layers allow it, which spreads outliers over more
static int64_t llama_rq_n(const llama_hparams & hparams, bool is_v) {
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (hparams.n_head_kv(il) > 0 && (is_v ? hparams.n_embd_head_v(il) : hparams.n_embd_head_k(il)) % (2*QK_RQ) != 0) {
            return QK_RQ;
        }
    }
    return 2*QK_RQ;
}

static std::shared_ptr<const llama_rq_rotation> llama_rq_make(ggml_type type, bool is_v, const llama_hparams & hparams) {
    if (!ggml_rq_is_type(type)) {
        return nullptr;
    }

    const auto family = ggml_rq_type_family(type);
    const auto mode   = llama_rq_mode(is_v);

    auto res = std::make_shared<llama_rq_rotation>();

    res->type = type;
    res->mode = mode;
    res->n    = llama_rq_n(hparams, is_v);

    if (mode != GGML_RQ_NONE) {
        res->data.resize(res->n*res->n);
        if (!ggml_rq_rotation_matrix(family, mode, res->n, res->data.data())) {
            throw std::runtime_error("no rotation matrix for this cache type");
        }
    }

    LLAMA_LOG_INFO("llama_rq: %s %s, rotation = %s, mode = %s, n = %d\n", is_v ? "V" : "K",
            ggml_type_name(type), LLAMA_RQ_FAMILIES[family], LLAMA_RQ_MODES[mode], (int) res->n);

    return res;
}

ggml_tensor * llama_rq_rotation::build_input(ggml_context * ctx, const char * name) const {
    if (data.empty()) {
        return nullptr;
    }

    ggml_tensor * res = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n, n);
    ggml_set_input(res);
    ggml_set_name(res, name);

    // a plain Hadamard matrix keeps upstream's hint and its fast path
    if (mode != GGML_RQ_HADAMARD) {
        res->op_params[0] = ggml_rq_hint(ggml_rq_type_family(type), (ggml_rq_mode) mode);
    }

    return res;
}

void llama_rq_rotation::set_input(ggml_tensor * dst) const {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));
    GGML_ASSERT(ggml_nbytes(dst) == data.size()*sizeof(float));

    memcpy(dst->data, data.data(), ggml_nbytes(dst));
}

// Layers of the model that count as having a KV cache. Where two caches share the layers by their attention window,
// these are the layers of both; anywhere else the cache's own filter says it. Layers that only predict further tokens
// (MTP) are not counted, they keep the types of their cache.
static std::vector<int32_t> llama_rq_counted_layers(const llama_hparams & hparams, const std::function<bool(int32_t il)> & filter) {
    bool windows = false;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        windows = windows || hparams.is_swa(il);
    }

    std::vector<int32_t> res;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        const bool kept = windows ? hparams.n_head_kv(il) > 0 && !hparams.is_recr(il) : !filter || filter(il);
        if (hparams.has_kv(il) && kept) {
            res.push_back(il);
        }
    }
    return res;
}

static ggml_type llama_rq_rotating_type(ggml_type type, const std::vector<llama_rq_entry> & entries, bool is_v) {
    if (ggml_rq_is_type(type)) {
        return type;
    }
    for (const auto & entry : entries) {
        const ggml_type other = is_v ? entry.type_v : entry.type_k;
        if (ggml_rq_is_type(other)) {
            return other;
        }
    }
    return type;
}

// LLAMA_RQ_SCALE, which ggml-rq.c reads; "inner" when it is not set
static std::string llama_rq_scale() {
    const char * env = getenv("LLAMA_RQ_SCALE");
    return env && *env ? env : "inner";
}

llama_rq_cache::llama_rq_cache(const llama_model & model, const llama_hparams & hparams, ggml_type type_k, ggml_type type_v,
        bool offload, const std::function<bool(int32_t il)> & filter, const char * name_tag) : base(type_k, type_v) {
    // a second cache beside the one for K and V keeps what an indexer needs
    std::vector<int32_t> counted;
    if (!*name_tag) {
        counted = llama_rq_counted_layers(hparams, filter);
    }

    const auto entries = counted.empty() ? std::vector<llama_rq_entry>() : llama_rq_entries();

    k = llama_rq_make(llama_rq_rotating_type(type_k, entries, false), false, model.hparams);
    v = llama_rq_make(llama_rq_rotating_type(type_v, entries, true),  true,  model.hparams);

    const std::string scale = llama_rq_scale();
    if ((k || v) && scale != "inner") {
        LLAMA_LOG_INFO("llama_rq: scale = %s\n", scale.c_str());
    }

    for (const auto & entry : entries) {
        for (const auto & range : entry.layers) {
            for (int i : llama_rq_indices(range, (int) counted.size())) {
                layers[counted[i]] = { entry.type_k, entry.type_v };
            }
        }
    }

    std::string text_k;
    std::string text_v;
    std::vector<int32_t> own; // counted layers of this cache
    for (size_t i = 0; i < counted.size(); ++i) {
        const int32_t il = counted[i];
        if (filter && !filter(il)) {
            continue;
        }
        own.push_back(il);

        const auto [layer_k, layer_v] = types(il);
        if (hparams.n_embd_head_k(il) % ggml_blck_size(layer_k) != 0 || hparams.n_embd_head_v(il) % ggml_blck_size(layer_v) != 0) {
            throw std::runtime_error("layers of the KV cache: heads of layer " + std::to_string(i) + " do not fill whole blocks of " +
                    ggml_type_name(layer_k) + " or " + ggml_type_name(layer_v) + ", use f16");
        }

        const std::string sep = (text_k.empty() ? "" : ", ") + std::to_string(i) + " ";
        text_k += sep + ggml_type_name(layer_k);
        text_v += sep + ggml_type_name(layer_v);
    }
    if (!layers.empty()) {
        LLAMA_LOG_INFO("llama_rq: K layers: %s\n", text_k.c_str());
        LLAMA_LOG_INFO("llama_rq: V layers: %s\n", text_v.c_str());
    }

    const char * calib = getenv("LLAMA_RQ_CALIB");
    if (!calib || !*calib || own.empty() || hparams.no_alloc) { // no_alloc: the weights are not there either
        return;
    }
    if (!k) {
        LLAMA_LOG_WARN("llama_rq: calibration %s is not used: K has none of the rotated types\n", calib);
        return;
    }
    const std::string rotation = std::string(LLAMA_RQ_FAMILIES[ggml_rq_type_family(k->type)]) + "/" + LLAMA_RQ_MODES[k->mode] + "/" + std::to_string(k->n);
    means = llama_rq_load_means(calib, model, rotation, own, offload);
}

std::pair<ggml_type, ggml_type> llama_rq_cache::types(int32_t il) const {
    const auto it = layers.find(il);
    return it == layers.end() ? base : it->second;
}

void llama_rq_cache::choose_upstream_rot(const llama_hparams & hparams, int n_embd_head_k, int n_embd_head_v, bool & rot_k, bool & rot_v) const {
    const char * disable = getenv("LLAMA_ATTN_ROT_DISABLE");
    if (disable && atoi(disable)) {
        return;
    }

    for (const auto & [il, types] : layers) {
        rot_k = rot_k || (ggml_is_quantized(types.first)  && n_embd_head_k > 0 && hparams.n_embd_head_k() % 64 == 0);
        rot_v = rot_v || (ggml_is_quantized(types.second) && n_embd_head_v > 0 && hparams.n_embd_head_v() % 64 == 0);
    }
}

// [head_dim, n_head_kv] as K of a token; null for a layer that has none
static ggml_tensor * llama_rq_mean(const llama_rq_cache & rq, ggml_context * ctx, const ggml_tensor * k, int32_t il) {
    if (!rq.means) {
        return nullptr;
    }
    const auto it = rq.means->k.find(il);
    return it == rq.means->k.end() ? nullptr : ggml_reshape_2d(ctx, it->second, k->ne[0], k->ne[1]);
}

ggml_tensor * llama_rq_cache::center(ggml_context * ctx, ggml_tensor * k_cur, int32_t il) const {
    ggml_tensor * mean = llama_rq_mean(*this, ctx, k_cur, il);
    return mean ? ggml_sub(ctx, k_cur, mean) : k_cur;
}

ggml_tensor * llama_rq_cache::uncenter(ggml_context * ctx, ggml_tensor * k_cur, int32_t il) const {
    ggml_tensor * mean = llama_rq_mean(*this, ctx, k_cur, il);
    return mean ? ggml_add(ctx, k_cur, mean) : k_cur;
}

bool llama_rq_cache::shift_whole_heads() const {
    return k || !layers.empty();
}

struct llama_rq_state_tag {
    uint32_t magic;
    uint32_t k; // n << 16 | type << 8 | mode, 0 for a type that is not ours
    uint32_t v;
    uint32_t means; // 0 without
};

static llama_rq_state_tag llama_rq_make_state_tag(const llama_rq_cache & rq) {
    const auto id = [](const llama_rq_rotation * r) { return r ? (uint32_t) r->n << 16 | (uint32_t) r->type << 8 | (uint32_t) r->mode : 0; };

    return { /*.magic =*/ 0x32515247, /*.k =*/ id(rq.k.get()), /*.v =*/ id(rq.v.get()), /*.means =*/ rq.means ? rq.means->hash : 0 }; // "GRQ2"
}

// upstream itself compares the type of each layer
void llama_rq_cache::state_write(llama_io_write_i & io) const {
    if (k || v) {
        const auto tag = llama_rq_make_state_tag(*this);
        io.write(&tag, sizeof(tag));
    }
}

void llama_rq_cache::state_read(llama_io_read_i & io) const {
    if (k || v) {
        const auto want = llama_rq_make_state_tag(*this);

        llama_rq_state_tag tag;
        io.read(&tag, sizeof(tag));
        if (memcmp(&tag, &want, sizeof(tag)) != 0) {
            throw std::runtime_error("the state was saved with another cache type, rotation mode or calibration");
        }
    }
}

static bool llama_rq_check_head(ggml_type type, const char * what, uint32_t n_embd_head) {
    if (!ggml_rq_is_type(type) || n_embd_head % QK_RQ == 0) {
        return true;
    }

    LLAMA_LOG_ERROR("llama_rq: cache type %s stores blocks of %d values and cannot hold this model's %s head_dim of %u: use %s instead\n",
            ggml_type_name(type), QK_RQ, what, n_embd_head, n_embd_head % 32 == 0 ? "q8_0 or q4_0" : "f16");

    return false;
}

static bool llama_rq_check_flash_attn(const std::vector<llama_rq_entry> & entries, llama_context_params & params) {
    for (const auto & entry : entries) {
        if (!ggml_is_quantized(entry.type_v) || params.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_ENABLED) {
            continue;
        }
        if (params.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_DISABLED) {
            LLAMA_LOG_ERROR("llama_rq: V of some layers is quantized (%s), which requires flash attention: use -fa on\n", ggml_type_name(entry.type_v));
            return false;
        }
        LLAMA_LOG_INFO("llama_rq: enabling flash attention, V of some layers is quantized\n");
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    }
    return true;
}

// a device that lacks kernels for these types is told by name: the scheduler would say nothing
static bool llama_rq_check_devices(const llama_model & model, const std::vector<llama_rq_entry> & entries, const llama_context_params & params) {
    const auto & hparams = model.hparams;

    if (!params.offload_kqv && model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        LLAMA_LOG_ERROR("llama_rq: --split-mode tensor cannot keep the cache on the CPU: use --split-mode layer with --no-kv-offload\n");
        return false;
    }

    std::vector<std::pair<ggml_type, ggml_type>> pairs = { { params.type_k, params.type_v } };
    for (const auto & entry : entries) {
        pairs.push_back({ entry.type_k, entry.type_v });
    }
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        ggml_backend_dev_t dev = model.dev_layer(il);
        if (!dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU || hparams.n_head_kv(il) == 0 || hparams.is_recr(il) || !hparams.has_kv(il)) {
            continue;
        }
        const llama_rq_shape shape = { hparams.n_embd_head_k(il), hparams.n_embd_head_v(il), hparams.n_head(il), hparams.n_head_kv(il) };
        for (const auto & [type_k, type_v] : pairs) {
            if (!ggml_rq_is_type(type_k) && !ggml_rq_is_type(type_v)) {
                continue;
            }
            for (const ggml_type type : { type_k, type_v }) {
                if (!llama_rq_device_knows(dev, type)) {
                    LLAMA_LOG_ERROR("llama_rq: %s (%s), which layer %d is on, does not know %s: run ggml-rpc-server of this build there, or take another cache type\n",
                            ggml_backend_dev_name(dev), ggml_backend_dev_description(dev), (int) il, ggml_type_name(type));
                    return false;
                }
            }
            if (!params.offload_kqv) {
                continue;
            }
            const std::string lack = llama_rq_device_lacks(dev, type_k, type_v, shape, params.flash_attn_type != LLAMA_FLASH_ATTN_TYPE_DISABLED);
            if (!lack.empty()) {
                LLAMA_LOG_ERROR("llama_rq: %s, which layer %d is on, %s: take other cache types (the same for K and V), or keep the cache on the CPU (--no-kv-offload)\n",
                        ggml_backend_dev_name(dev), (int) il, lack.c_str());
                return false;
            }
        }
    }
    return true;
}

bool llama_rq_check(const llama_model & model, llama_context_params & params) {
    const auto & hparams = model.hparams;

    std::vector<llama_rq_entry> entries;
    try {
        entries = llama_rq_entries();
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("llama_rq: %s\n", err.what());
        return false;
    }

    const ggml_type type_k = llama_rq_rotating_type(params.type_k, entries, false);
    const ggml_type type_v = llama_rq_rotating_type(params.type_v, entries, true);

    if (!ggml_rq_is_type(type_k) && !ggml_rq_is_type(type_v) && entries.empty()) {
        return true;
    }

    const std::string scale = llama_rq_scale();
    if (scale != "inner" && scale != "lsq" && scale != "norm") {
        LLAMA_LOG_ERROR("llama_rq: LLAMA_RQ_SCALE: unknown scale '%s', use inner, lsq or norm\n", scale.c_str());
        return false;
    }

    // the caches of a lightning indexer take fixed type lists and rotate on their own
    if (hparams.indexer_head_size > 0) {
        LLAMA_LOG_ERROR("llama_rq: cache types %s/%s do not work with this model's sparse attention indexer: use q8_0 instead\n",
                ggml_type_name(type_k), ggml_type_name(type_v));
        return false;
    }
    if (!entries.empty() && (hparams.is_mla() || model.arch == LLM_ARCH_DEEPSEEK4)) {
        LLAMA_LOG_ERROR("llama_rq: layers of the KV cache cannot have types of their own in this model, K and V are one (MLA): use one type\n");
        return false;
    }

    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (hparams.n_head_kv(il) == 0) {
            continue;
        }
        if (!llama_rq_check_head(type_k, "K", hparams.n_embd_head_k(il)) ||
            !llama_rq_check_head(type_v, "V", hparams.n_embd_head_v(il))) {
            return false;
        }
    }

    return llama_rq_check_flash_attn(entries, params) && llama_rq_check_devices(model, entries, params);
}

bool llama_rq_is_type(ggml_type type) {
    return ggml_rq_is_type(type);
}

bool llama_rq_is_rotation(const ggml_tensor * rot) {
    return rot->op == GGML_OP_NONE && ggml_rq_hint_is_rotation(rot->op_params[0]);
}

ggml_tensor * llama_rq_rotate(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * rot) {
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

void llama_rq_expand(ggml_cgraph * gf, ggml_tensor * rot, std::initializer_list<ggml_tensor *> tensors) {
    if (!rot || !llama_rq_is_rotation(rot)) {
        return;
    }
    for (ggml_tensor * t : tensors) {
        if (t) {
            ggml_build_forward_expand(gf, t);
        }
    }
}

ggml_tensor * llama_rq_view_heads(ggml_context * ctx, ggml_tensor * k, int64_t n_embd_head, int64_t n_head_kv, int64_t n_cells) {
    return ggml_view_3d(ctx, k, n_embd_head, n_head_kv, n_cells,
            ggml_row_size(k->type, n_embd_head), ggml_row_size(k->type, n_embd_head*n_head_kv), 0);
}
