#include "llama-rq.h"
#include "llama-rq-device.h"
#include "llama-rq-layers.h"
#include "llama-rq-modes.h"

#include "llama-impl.h"
#include "llama-model.h"

#include "../ggml/src/ggml-rq-types.h"

#include "ggml-backend.h"

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

int64_t llama_rq_blck_size(ggml_type type) {
    return ggml_rq_is_type(type) ? 1 : ggml_blck_size(type);
}

// bits that a value of such a head takes, filled up as it is
static double llama_rq_bits(ggml_type type, uint32_t n_embd_head) {
    const int64_t n = llama_rq_padded(n_embd_head);
    return 8.0*ggml_row_size(ggml_rq_type_for_head(type, n), n)/n_embd_head;
}

// Heads that are no multiple of 64 are filled up to one, where that still takes less than what upstream can keep them in. With MLA
// V is a view of K, so that there is no filling up K behind it.
static bool llama_rq_check_head(ggml_type type, const char * what, uint32_t n_embd_head, bool mla) {
    if (!ggml_rq_is_type(type) || n_embd_head % QK_RQ_64 == 0) {
        return true;
    }
    const bool   blocks = n_embd_head % ggml_blck_size(GGML_TYPE_Q4_0) == 0;
    const double most   = blocks ? 8.0*ggml_row_size(GGML_TYPE_Q4_0, n_embd_head)/n_embd_head : 16.0;
    if (mla) {
        LLAMA_LOG_ERROR("llama_rq: cache type %s stores blocks of 64 or 128 values and cannot hold this model's %s head_dim of %u: use %s instead\n",
                ggml_type_name(type), what, n_embd_head, blocks ? "q8_0 or q4_0" : "f16");
        return false;
    }
    const double bits = llama_rq_bits(type, n_embd_head);
    if (bits < most) {
        return true;
    }
    const char * usual = blocks ? "q4_0" : "f16";
    std::string others = format("%s (%.2f)", usual, most);
    for (int n = ggml_rq_type_bits(type) - 1; n >= 2; --n) {
        const ggml_type other = (ggml_type) ((int) GGML_TYPE_PLANAR2 + 3*(int) ggml_rq_type_family(type) + n - 2);
        if (llama_rq_bits(other, n_embd_head) < most) {
            others += format(" or %s (%.2f)", ggml_type_name(other), llama_rq_bits(other, n_embd_head));
            break;
        }
    }
    LLAMA_LOG_ERROR("llama_rq: cache type %s cannot hold this model's %s head_dim of %u in fewer bits than %s: filled up to %d values it takes %.2f a value, use %s instead\n",
            ggml_type_name(type), what, n_embd_head, usual, (int) llama_rq_padded(n_embd_head), bits, others.c_str());
    return false;
}

// Why the graph of a model cannot read what is rotated; null where it can. What else is left to attention, build_attn_mha does.
static const char * llama_rq_refused(const llama_model & model) {
    const std::string arch = llm_arch_name(model.arch);
    if (arch == "deepseek4" || (arch == "dflash" && model.hparams.dsv4_hc_mult > 0)) {
        return "copies the keys of its window and its compressed ones before it attends to them";
    }
    if (arch == "glm5-next") {
        return "reads keys past attention, too";
    }
    return nullptr;
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
    // once any layer has a type of ours, heads are filled up in all of them
    const bool fill_k = ggml_rq_is_type(llama_rq_rotating_type(params.type_k, entries, false));
    const bool fill_v = ggml_rq_is_type(llama_rq_rotating_type(params.type_v, entries, true));
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        ggml_backend_dev_t dev = model.dev_layer(il);
        if (!dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU || hparams.n_head_kv(il) == 0 || hparams.is_recr(il) || !hparams.has_kv(il)) {
            continue;
        }
        for (const auto & [asked_k, asked_v] : pairs) {
            if (!ggml_rq_is_type(asked_k) && !ggml_rq_is_type(asked_v)) {
                continue;
            }
            llama_rq_shape shape = llama_rq_shape::of(hparams, il);
            if (fill_k) {
                shape.n_embd_head_k = llama_rq_padded(shape.n_embd_head_k);
            }
            if (fill_v) {
                shape.n_embd_head_v = llama_rq_padded(shape.n_embd_head_v);
            }
            const bool filled_up = shape.n_embd_head_k > hparams.n_embd_head_k(il) || shape.n_embd_head_v > hparams.n_embd_head_v(il);
            if (filled_up && model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
                LLAMA_LOG_ERROR("llama_rq: --split-mode tensor does not divide heads that are filled up to a multiple of 64: use --split-mode layer\n");
                return false;
            }
            for (const bool is_v : { false, true }) {
                const ggml_type asked = is_v ? asked_v : asked_k;
                if (!llama_rq_device_knows(dev, shape.stored(asked, is_v))) {
                    LLAMA_LOG_ERROR("llama_rq: %s (%s), which layer %d is on, does not know %s: run ggml-rpc-server of this build there, or take another cache type\n",
                            ggml_backend_dev_name(dev), ggml_backend_dev_description(dev), (int) il, ggml_type_name(asked));
                    return false;
                }
            }
            if (!params.offload_kqv) {
                continue;
            }
            const std::string lack = llama_rq_device_lacks(dev, asked_k, asked_v, shape, params.flash_attn_type != LLAMA_FLASH_ATTN_TYPE_DISABLED);
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

    for (const ggml_type type : { params.type_k, params.type_v }) {
        if (ggml_rq_is_sibling(type)) {
            LLAMA_LOG_ERROR("llama_rq: %s is no cache type by itself, but what iso3 and its kind are in heads of 64\n", ggml_type_name(type));
            return false;
        }
    }

    const ggml_type type_k = llama_rq_rotating_type(params.type_k, entries, false);
    const ggml_type type_v = llama_rq_rotating_type(params.type_v, entries, true);

    if (!ggml_rq_is_type(type_k) && !ggml_rq_is_type(type_v) && entries.empty()) {
        return true;
    }

    const char * scale_name = getenv("LLAMA_RQ_SCALE");
    ggml_rq_scale scale;
    if (!ggml_rq_scale_from_name(scale_name, &scale)) {
        LLAMA_LOG_ERROR("llama_rq: LLAMA_RQ_SCALE: unknown scale '%s', use inner, lsq or norm\n", scale_name);
        return false;
    }

    if (const char * why = llama_rq_refused(model)) {
        LLAMA_LOG_ERROR("llama_rq: cache types %s/%s do not work with this model, whose graph %s: use q8_0 instead\n",
                ggml_type_name(type_k), ggml_type_name(type_v), why);
        return false;
    }
    // with a bias of the scores upstream leaves flash attention, and takes V apart as if it were no blocks
    bool v_blocks = ggml_is_quantized(params.type_v);
    for (const auto & entry : entries) {
        v_blocks = v_blocks || ggml_is_quantized(entry.type_v);
    }
    if (hparams.n_rel_attn_bkts > 0 && v_blocks) {
        LLAMA_LOG_ERROR("llama_rq: this model adds a bias to the scores of attention, which takes V in f16: use f16 for V\n");
        return false;
    }
    const bool mla      = hparams.is_mla();
    const bool by_graph = llama_rq_turned_by_graph(model);
    if (!entries.empty() && (mla || by_graph)) {
        LLAMA_LOG_ERROR("llama_rq: layers of the KV cache cannot have types of their own in this model, %s: use one type\n",
                mla ? "K and V are one (MLA)" : "whose graph turns all of them alike (MSA)");
        return false;
    }

    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (hparams.n_head_kv(il) == 0) {
            continue;
        }
        std::vector<std::pair<ggml_type, ggml_type>> pairs = { { type_k, type_v } };
        for (const auto & entry : entries) {
            pairs.push_back({ entry.type_k, entry.type_v });
        }
        for (const auto & [k, v] : pairs) {
            if (!llama_rq_check_head(k, "K", hparams.n_embd_head_k(il), mla || by_graph) ||
                !llama_rq_check_head(v, "V", hparams.n_embd_head_v(il), mla || by_graph)) {
                return false;
            }
        }
    }

    return llama_rq_check_flash_attn(entries, params) && llama_rq_check_devices(model, entries, params);
}
