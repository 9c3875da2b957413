#include "llama-rq-calib.h"
#include "llama-rq-modes.h"

#include "llama-impl.h"
#include "llama-model.h"

#include "gguf.h"

#include <cmath>
#include <cstdio>
#include <map>
#include <stdexcept>

static constexpr uint32_t LLAMA_RQ_CALIB_VERSION = 1;

static std::runtime_error llama_rq_calib_error(const std::string & path, const std::string & what) {
    return std::runtime_error("the calibration file " + path + " " + what + ": make one with ggufrq calibrate");
}

// FNV-1a
static uint64_t llama_rq_hash(const void * data, size_t size, uint64_t h = 0xcbf29ce484222325) {
    for (size_t i = 0; i < size; ++i) {
        h = (h ^ ((const uint8_t *) data)[i]) * 0x100000001b3;
    }
    return h;
}

// What quantization leaves as it is: the architecture, the number of layers, the width, and the last norm. So a file
// serves all quantizations of a model and no other one. ggufrq/calibrate.py computes the same.
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

static std::string llama_rq_calib_str(const gguf_context * gguf, const char * key) {
    const int64_t id = gguf_find_key(gguf, key);
    return id >= 0 && gguf_get_kv_type(gguf, id) == GGUF_TYPE_STRING ? gguf_get_val_str(gguf, id) : "";
}

static uint32_t llama_rq_calib_u32(const gguf_context * gguf, const char * key) {
    const int64_t id = gguf_find_key(gguf, key);
    return id >= 0 && gguf_get_kv_type(gguf, id) == GGUF_TYPE_UINT32 ? gguf_get_val_u32(gguf, id) : 0;
}

static std::string llama_rq_mean_name(int32_t il) {
    return "blk." + std::to_string(il) + ".k_mean";
}

static void llama_rq_check_attention(const std::string & path, const llama_model & model, const std::vector<int32_t> & layers) {
    const auto refuse = [&](const std::string & why) {
        return std::runtime_error("the calibration file " + path + " cannot be used, " + why);
    };

    if (model.hparams.is_mla() || model.hparams.n_lora_kv > 0 || model.arch == LLM_ARCH_DEEPSEEK4) {
        throw refuse("this model's values are read from its keys (MLA)");
    }
    if (model.hparams.attn_soft_cap || model.arch == LLM_ARCH_GROK) {
        throw refuse("this model caps its attention scores, so that a constant added to all keys matters");
    }
    for (int32_t il : layers) {
        if (model.layers[il].attn_sinks) {
            throw refuse("this model has attention sinks, so that a constant added to all keys matters");
        }
    }
}

llama_rq_means llama_rq_load_means(const std::string & path, const llama_model & model, const llama_rq_rotation & rotation,
        const std::vector<int32_t> & layers) {
    llama_rq_check_attention(path, model, layers);

    ggml_context * data = nullptr;
    gguf_context_ptr gguf { gguf_init_from_file(path.c_str(), { /*.no_alloc =*/ false, /*.ctx =*/ &data }) };
    ggml_context_ptr ctx_file { data };

    if (!gguf || !data) {
        throw llama_rq_calib_error(path, "cannot be read, it is missing or damaged");
    }
    if (llama_rq_calib_str(gguf.get(), "general.type") != "kv-calib") {
        throw llama_rq_calib_error(path, "holds no means of K");
    }
    if (llama_rq_calib_u32(gguf.get(), "rq.calib.version") != LLAMA_RQ_CALIB_VERSION) {
        throw llama_rq_calib_error(path, "is of another version");
    }
    if (llama_rq_calib_str(gguf.get(), "rq.calib.model") != llama_rq_fingerprint(model)) {
        throw llama_rq_calib_error(path, "is for another model");
    }
    const std::string made_for = llama_rq_calib_str(gguf.get(), "rq.calib.k_rotation");
    const std::string wanted   = std::string(llama_rq_family_name(rotation.type)) + "/" + llama_rq_mode_name(rotation.mode) + "/" + std::to_string(rotation.n);
    if (made_for != wanted) {
        throw llama_rq_calib_error(path, "is for K rotated by " + made_for + ", not " + wanted);
    }

    llama_rq_means res;
    uint64_t h = llama_rq_hash(nullptr, 0);

    for (int32_t il : layers) {
        const std::string name = llama_rq_mean_name(il);

        const ggml_tensor * mean = ggml_get_tensor(data, name.c_str());
        if (!mean || mean->type != GGML_TYPE_F32 || mean->ne[0] != model.hparams.n_embd_head_k(il) ||
                mean->ne[1] != model.hparams.n_head_kv(il) || mean->ne[2] != 1 || mean->ne[3] != 1) {
            throw llama_rq_calib_error(path, "has no " + name + " of this model's shape");
        }
        for (int64_t i = 0; i < ggml_nelements(mean); ++i) {
            if (!std::isfinite(((const float *) mean->data)[i])) {
                throw llama_rq_calib_error(path, "has a value in " + name + " that is not finite");
            }
        }
        h = llama_rq_hash(mean->data, ggml_nbytes(mean), h);

        auto & values = res.k[il];
        values.assign((const float *) mean->data, (const float *) mean->data + ggml_nelements(mean));
        for (size_t i = 0; i < values.size(); i += rotation.n) { // its own inverse
            ggml_rq_rotate_row(ggml_rq_type_family(rotation.type), rotation.mode, values.data() + i, values.data() + i, rotation.n);
        }
    }

    res.hash = (uint32_t) (h ^ h >> 32);

    LLAMA_LOG_INFO("llama_rq: calibration %s: %d layers\n", path.c_str(), (int) layers.size());

    return res;
}
