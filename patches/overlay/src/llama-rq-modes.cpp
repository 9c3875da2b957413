#include "llama-rq-modes.h"

#include "llama-hparams.h"
#include "llama-model.h"

#include <cmath>
#include <cstdlib>
#include <numeric>
#include <stdexcept>

static const char * const LLAMA_RQ_FAMILIES[] = { "planar", "iso", "rotor" };
static const char * const LLAMA_RQ_MODES[]    = { "none", "block", "hadamard", "full" };

ggml_type llama_rq_rotating_type(ggml_type type, const std::vector<llama_rq_entry> & entries, bool is_v) {
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

bool llama_rq_rotations_disabled() {
    const char * disable = getenv("LLAMA_ATTN_ROT_DISABLE");
    return disable && atoi(disable);
}

static ggml_rq_mode llama_rq_mode_from_str(const std::string & s) {
    for (int i = 0; i < 4; ++i) {
        if (s == LLAMA_RQ_MODES[i]) {
            return (ggml_rq_mode) i;
        }
    }
    throw std::runtime_error("LLAMA_RQ_MODE: unknown rotation mode '" + s +
            "', use full, block, hadamard or none (K/V apart: full/block)");
}

ggml_rq_mode llama_rq_mode(bool is_v) {
    if (llama_rq_rotations_disabled()) {
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

int64_t llama_rq_padded(int64_t n_embd_head) {
    return GGML_PAD(n_embd_head, QK_RQ_64);
}

int64_t llama_rq_whole(int64_t n_embd_head_k, int64_t n_embd_head_v, bool v_in_k, bool is_v) {
    return v_in_k ? std::gcd(n_embd_head_k, n_embd_head_v) : is_v ? n_embd_head_v : n_embd_head_k;
}

int64_t llama_rq_head(const llama_hparams & hparams, uint32_t il, bool is_v) {
    return llama_rq_whole(llama_rq_padded(hparams.n_embd_head_k(il)), llama_rq_padded(hparams.n_embd_head_v(il)), hparams.is_mla(), is_v);
}

int64_t llama_rq_n(const llama_hparams & hparams, bool is_v) {
    int64_t n = 2*QK_RQ;
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        while (hparams.n_head_kv(il) > 0 && n > QK_RQ_64 && llama_rq_head(hparams, il, is_v) % n != 0) {
            n /= 2;
        }
    }
    return n;
}

bool llama_rq_turned_by_graph(const llama_model & model) {
    return std::string(llm_arch_name(model.arch)) == "minimax-m3"; // not every upstream version knows it
}

const char * llama_rq_family_name(ggml_type type) {
    return LLAMA_RQ_FAMILIES[ggml_rq_type_family(type)];
}

const char * llama_rq_mode_name(int mode) {
    return LLAMA_RQ_MODES[mode];
}

static void llama_rq_apply_hadamard(float * x, int64_t n) {
    for (int64_t h = 1; h < n; h *= 2) {
        for (int64_t i = 0; i < n; ++i) {
            if (!(i & h)) {
                const float a = x[i];
                const float b = x[i + h];
                x[i]     = a + b;
                x[i + h] = a - b;
            }
        }
    }
    const float scale = 1.0f/std::sqrt((float) n);
    for (int64_t i = 0; i < n; ++i) {
        x[i] *= scale;
    }
}

void llama_rq_turn::apply(float * x, int64_t size) const {
    for (int64_t i = 0; n > 0 && i < size; i += n) {
        if (hint == GGML_HINT_SRC0_IS_HADAMARD) {
            llama_rq_apply_hadamard(x + i, n);
        } else if (!ggml_rq_rotate_row(ggml_rq_hint_family(hint), ggml_rq_hint_mode(hint), x + i, x + i, n)) {
            throw std::runtime_error("no rotation of this kind for this cache type");
        }
    }
}

std::vector<float> llama_rq_turn::matrix() const {
    std::vector<float> res(n*n, 0.0f);
    for (int64_t i = 0; i < n; ++i) {
        res[i*n + i] = 1.0f;
        apply(res.data() + i*n, n);
    }
    return res;
}

llama_rq_turn llama_rq_turn_of(ggml_type type, int mode, int64_t n, int64_t n_embd_head, bool is_v) {
    if (ggml_rq_is_type(type)) {
        if (mode == GGML_RQ_NONE) {
            return {};
        }
        // a plain Hadamard matrix keeps upstream's hint and its fast path
        return { n, mode == GGML_RQ_HADAMARD ? (int32_t) GGML_HINT_SRC0_IS_HADAMARD : ggml_rq_hint(ggml_rq_type_family(type), (ggml_rq_mode) mode) };
    }
    if (!ggml_is_quantized(type) || n_embd_head % 64 != 0 || llama_rq_rotations_disabled()) {
        return {};
    }
    llama_rq_turn res = { 64, GGML_HINT_SRC0_IS_HADAMARD };
    while (!is_v && n_embd_head % (2*res.n) == 0) {
        res.n *= 2;
    }
    return res;
}

llama_rq_profile_wish llama_rq_wished_profile() {
    for (const char * name : { "LLAMA_RQ_PROFILE", "LLAMA_RQ_CALIB" }) {
        const char * env = getenv(name);
        if (env && *env) {
            return { std::string(env) == "none" ? "" : env, true };
        }
    }
    const char * beside = getenv("LLAMA_RQ_PROFILE_BESIDE");
    return { beside ? beside : "", false };
}
