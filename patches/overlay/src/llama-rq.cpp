#include "llama-rq.h"

#include "llama-impl.h"
#include "llama-io.h"
#include "llama-hparams.h"

#include "../ggml/src/ggml-rq-types.h"

#include "ggml.h"
#include "ggml-backend.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

// the tables repeat every 128 values, so does the rotation
static constexpr int64_t LLAMA_RQ_N = 128;

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

static std::shared_ptr<const llama_rq_rotation> llama_rq_make(ggml_type type, bool is_v) {
    if (!ggml_rq_is_type(type)) {
        return nullptr;
    }

    const auto family = ggml_rq_type_family(type);
    const auto mode   = llama_rq_mode(is_v);

    auto res = std::make_shared<llama_rq_rotation>();

    res->type = type;
    res->mode = mode;
    res->n    = LLAMA_RQ_N;

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

llama_rq_cache::llama_rq_cache(ggml_type type_k, ggml_type type_v) :
    k(llama_rq_make(type_k, false)), v(llama_rq_make(type_v, true)) {}

struct llama_rq_state_tag {
    uint32_t magic;
    uint32_t k; // type << 8 | mode, 0 for a type that is not ours
    uint32_t v;
};

static llama_rq_state_tag llama_rq_make_state_tag(const llama_rq_cache & rq) {
    const auto id = [](const llama_rq_rotation * r) { return r ? (uint32_t) r->type << 8 | (uint32_t) r->mode : 0; };

    return { /*.magic =*/ 0x31515247, /*.k =*/ id(rq.k.get()), /*.v =*/ id(rq.v.get()) }; // "GRQ1"
}

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
            throw std::runtime_error("the state was saved with another cache type or rotation mode");
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

bool llama_rq_check(const llama_hparams & hparams, ggml_type type_k, ggml_type type_v) {
    if (!ggml_rq_is_type(type_k) && !ggml_rq_is_type(type_v)) {
        return true;
    }

    // the caches of a lightning indexer take fixed type lists and rotate on their own
    if (hparams.indexer_head_size > 0) {
        LLAMA_LOG_ERROR("llama_rq: cache types %s/%s do not work with this model's sparse attention indexer: use q8_0 instead\n",
                ggml_type_name(type_k), ggml_type_name(type_v));
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

    return true;
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

ggml_tensor * llama_rq_view_heads(ggml_context * ctx, ggml_tensor * k, int64_t n_embd_head, int64_t n_head_kv, int64_t n_cells) {
    return ggml_view_3d(ctx, k, n_embd_head, n_head_kv, n_cells,
            ggml_row_size(k->type, n_embd_head), ggml_row_size(k->type, n_embd_head*n_head_kv), 0);
}
