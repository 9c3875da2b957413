#include "llama-rq-profile.h"
#include "llama-rq-modes.h"

#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-cpp.h"
#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <mutex>
#include <set>
#include <stdexcept>

static constexpr uint32_t LLAMA_RQ_PROFILE_VERSION = 1;

// how far A*x may be from x once the inverse is applied, of the length of x
static constexpr double LLAMA_RQ_INVERSE_TOLERANCE = 1e-3;

// FNV-1a
static uint64_t llama_rq_hash(const void * data, size_t size, uint64_t h = 0xcbf29ce484222325) {
    for (size_t i = 0; i < size; ++i) {
        h = (h ^ ((const uint8_t *) data)[i]) * 0x100000001b3;
    }
    return h;
}

// What quantization leaves as it is: the architecture, the number of layers, the width, and the last norm. So a file
// serves all quantizations of a model and no other one. fingerprint() in Python computes the same.
static std::string llama_rq_fingerprint(const llama_model & model) {
    const std::string shape = std::string(llm_arch_name(model.arch)) + "/" +
        std::to_string(model.hparams.n_layer_all) + "/" + std::to_string(model.hparams.n_embd) + "/";
    uint64_t h = llama_rq_hash(shape.data(), shape.size());

    if (model.output_norm) {
        std::vector<uint8_t> data(ggml_nbytes(model.output_norm));
        ggml_backend_tensor_get(model.output_norm, data.data(), 0, data.size());
        h = llama_rq_hash(data.data(), data.size(), h);
    }

    char res[17];
    snprintf(res, sizeof(res), "%016llx", (unsigned long long) h);
    return res;
}

// why a constant added to all keys matters in this model; empty where it does not
static std::string llama_rq_means_matter(const llama_model & model, const std::vector<int32_t> & layers) {
    if (model.hparams.attn_soft_cap || model.arch == LLM_ARCH_GROK) {
        return "caps its attention scores";
    }
    for (int32_t il : layers) {
        if (model.layers[il].attn_sinks) {
            return "has attention sinks";
        }
    }
    return "";
}

// A file of either kind, with the sentences that say what is wrong with it
class llama_rq_profile_file {
public:
    explicit llama_rq_profile_file(const std::string & path) : path(path) {
        ggml_context * ctx = nullptr;
        gguf.reset(gguf_init_from_file(path.c_str(), { /*.no_alloc =*/ false, /*.ctx =*/ &ctx }));
        data.reset(ctx);
        if (!gguf || !data) {
            throw wrong("cannot be read, it is missing or damaged");
        }
        means_only = str("general.type") == "kv-calib";
        if (!means_only && str("general.type") != "kv-profile") {
            throw wrong("is none: it holds no metric of K");
        }
        if (u32("version") != LLAMA_RQ_PROFILE_VERSION) {
            throw wrong("is of another version");
        }
    }

    std::runtime_error wrong(const std::string & what) const {
        return std::runtime_error("the profile " + path + " " + what + ": make one with ggufrq calibrate");
    }

    std::string str(const std::string & key) const {
        const int64_t id = gguf_find_key(gguf.get(), key.c_str());
        return id >= 0 && gguf_get_kv_type(gguf.get(), id) == GGUF_TYPE_STRING ? gguf_get_val_str(gguf.get(), id) : "";
    }

    // rq.profile.NAME, or rq.calib.NAME in a file of means
    std::string key(const char * name) const { return std::string(means_only ? "rq.calib." : "rq.profile.") + name; }

    uint32_t u32(const char * name) const {
        const int64_t id = gguf_find_key(gguf.get(), key(name).c_str());
        return id >= 0 && gguf_get_kv_type(gguf.get(), id) == GGUF_TYPE_UINT32 ? gguf_get_val_u32(gguf.get(), id) : 0;
    }

    // all values of a layer's tensor of this shape; empty when it may be missing and is
    std::vector<float> values(int32_t il, const char * what, const std::vector<int64_t> & ne, bool may_be_missing = false) const {
        const std::string name = "blk." + std::to_string(il) + "." + what;

        const ggml_tensor * t = ggml_get_tensor(data.get(), name.c_str());
        if (!t && may_be_missing) {
            return {};
        }
        bool fits = t && t->type == GGML_TYPE_F32;
        for (int i = 0; fits && i < GGML_MAX_DIMS; ++i) {
            fits = t->ne[i] == (i < (int) ne.size() ? ne[i] : 1);
        }
        if (!fits) {
            throw wrong("has no " + name + " of this model's shape");
        }
        std::vector<float> res((const float *) t->data, (const float *) t->data + ggml_nelements(t));
        if (!std::all_of(res.begin(), res.end(), [](float x) { return std::isfinite(x); })) {
            throw wrong("has a value in " + name + " that is not finite");
        }
        return res;
    }

    bool means_only;

private:
    const std::string path;

    gguf_context_ptr gguf;
    ggml_context_ptr data;
};

// y = a*x, a [n][n]
static std::vector<double> llama_rq_times(const float * a, const std::vector<double> & x) {
    const size_t n = x.size();
    std::vector<double> y(n, 0.0);
    for (size_t i = 0; i < n; ++i) {
        for (size_t j = 0; j < n; ++j) {
            y[i] += (double) a[i*n + j]*x[j];
        }
    }
    return y;
}

// are a and b, [n][n], each other's inverse, as seen from a vector with all directions in it?
static bool llama_rq_is_inverse(const float * a, const float * b, size_t n) {
    std::vector<double> x(n);
    uint32_t state = 1;
    for (auto & v : x) {
        state = state*1664525u + 1013904223u;
        v = (double) state/0x80000000u - 1.0;
    }
    const auto y = llama_rq_times(b, llama_rq_times(a, x));

    double err = 0.0, len = 0.0;
    for (size_t i = 0; i < n; ++i) {
        err += (y[i] - x[i])*(y[i] - x[i]);
        len += x[i]*x[i];
    }
    return err <= LLAMA_RQ_INVERSE_TOLERANCE*LLAMA_RQ_INVERSE_TOLERANCE*len;
}

// The files that fitted a model of this process. Another model beside it, as a draft, is not what such a file is for.
static bool llama_rq_is_of_another(const std::string & path, bool fits) {
    static std::mutex mutex;
    static std::set<std::string> fitted;

    std::lock_guard<std::mutex> lock(mutex);
    if (fits) {
        fitted.insert(path);
    }
    return !fits && fitted.count(path) > 0;
}

llama_rq_profile llama_rq_load_profile(const llama_rq_profile_wish & wish, const llama_model & model, const llama_rq_rotation & rotation,
        const std::vector<int32_t> & layers) {
    const auto & hparams = model.hparams;
    const auto & path    = wish.path;

    const llama_rq_profile_file file(path);

    const bool fits = file.str(file.key("model")) == llama_rq_fingerprint(model);
    if (llama_rq_is_of_another(path, fits)) {
        LLAMA_LOG_WARN("llama_rq: profile %s is not used for this model: it is that of another one of this process\n", path.c_str());
        return {};
    }
    if (!fits && !wish.asked) {
        LLAMA_LOG_WARN("llama_rq: profile %s is for another model and is not used\n", path.c_str());
        return {};
    }
    const char * why =
        hparams.is_mla() || hparams.n_lora_kv > 0 ? "this model's values are read from its keys (MLA)" :
        llama_rq_turned_by_graph(model)           ? "this model turns its queries itself (MSA)" : nullptr;
    if (why && !wish.asked) {
        LLAMA_LOG_WARN("llama_rq: profile %s is not used, %s\n", path.c_str(), why);
        return {};
    }
    if (why) {
        throw std::runtime_error("the profile " + path + " cannot be used, " + why);
    }
    const std::string matter = llama_rq_means_matter(model, layers);
    if (file.means_only && !matter.empty()) {
        throw std::runtime_error("the profile " + path + " cannot be used, it holds means alone and this model " + matter + ", so that a constant added to all keys matters");
    }
    if (!fits) {
        throw file.wrong("is for another model");
    }
    const std::string wanted = std::string(llama_rq_family_name(rotation.type)) + "/" + llama_rq_mode_name(rotation.mode) + "/" + std::to_string(rotation.n);
    if (file.means_only && file.str(file.key("k_rotation")) != wanted) {
        throw file.wrong("is for K rotated by " + file.str(file.key("k_rotation")) + ", not " + wanted);
    }

    llama_rq_profile res;
    uint64_t h = llama_rq_hash(nullptr, 0);

    for (int32_t il : layers) {
        const int64_t n      = hparams.n_embd_head_k(il);
        const int64_t n_head = hparams.n_head_kv(il);

        llama_rq_profile::layer & layer = res.layers[il];
        layer.k_mean = file.values(il, "k_mean", { n, n_head }, !file.means_only);
        if (!matter.empty()) {
            layer.k_mean.clear();
        }
        h = llama_rq_hash(layer.k_mean.data(), layer.k_mean.size()*sizeof(float), h);
        if (file.means_only) {
            for (size_t i = 0; i < layer.k_mean.size(); i += rotation.n) { // its own inverse
                float * row = layer.k_mean.data() + i;
                ggml_rq_rotate_row(ggml_rq_type_family(rotation.type), rotation.mode, row, row, rotation.n);
            }
            continue;
        }

        layer.k_map = file.values(il, "k_map", { n, n, n_head });
        layer.q_map = file.values(il, "q_map", { n, n, n_head });
        for (int64_t i = 0; i < n_head; ++i) {
            if (!llama_rq_is_inverse(layer.k_map.data() + i*n*n, layer.q_map.data() + i*n*n, n)) {
                throw file.wrong("has maps of K and of the queries that do not undo each other, in layer " + std::to_string(il));
            }
        }
        h = llama_rq_hash(layer.k_map.data(), layer.k_map.size()*sizeof(float), h);
    }

    res.hash = (uint32_t) (h ^ h >> 32);

    if (file.means_only) {
        LLAMA_LOG_INFO("llama_rq: calibration %s: %d layers\n", path.c_str(), (int) layers.size());
    } else {
        LLAMA_LOG_INFO("llama_rq: profile %s: from %s, %u positions, %d layers%s\n", path.c_str(), file.str(file.key("source")).c_str(), file.u32("n_ctx"),
                (int) layers.size(), matter.empty() ? "" : ", without means");
    }
    return res;
}
