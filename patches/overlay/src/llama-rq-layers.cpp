#include "llama-rq-layers.h"

#include "llama-hparams.h"

#include "../ggml/src/ggml-rq-types.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

static const ggml_type LLAMA_RQ_CACHE_TYPES[] = {
    GGML_TYPE_F32,     GGML_TYPE_F16,     GGML_TYPE_BF16,
    GGML_TYPE_Q8_0,    GGML_TYPE_Q4_0,    GGML_TYPE_Q4_1,  GGML_TYPE_IQ4_NL, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1,
    GGML_RQ_TYPE_LIST,
};

static std::runtime_error llama_rq_layers_error(const std::string & what) {
    return std::runtime_error("layers of the KV cache: " + what);
}

static std::vector<std::string> llama_rq_split(const std::string & s, char sep) {
    std::vector<std::string> parts;
    size_t from = 0;
    for (size_t to; (to = s.find(sep, from)) != std::string::npos; from = to + 1) {
        parts.push_back(s.substr(from, to - from));
    }
    parts.push_back(s.substr(from));
    return parts;
}

static ggml_type llama_rq_type_from_name(const std::string & name) {
    for (ggml_type type : LLAMA_RQ_CACHE_TYPES) {
        if (name == ggml_type_name(type)) {
            return type;
        }
    }
    throw llama_rq_layers_error("there is no cache type '" + name + "'");
}

// n or a-b, where each number may be negative
static llama_rq_entry::range llama_rq_range_from_str(const std::string & s) {
    const auto number = [&](const char * from, const char ** end) {
        const char * digits = from + (*from == '-');
        const size_t n = strspn(digits, "0123456789");
        if (n == 0 || n > 6) {
            throw llama_rq_layers_error("'" + s + "' is no layer and no range of layers, write 3, -1 or 0-2");
        }
        *end = digits + n;
        return atoi(from);
    };

    const char * end;
    llama_rq_entry::range res;
    res.first = res.last = number(s.c_str(), &end);
    if (*end == '-') {
        res.last = number(end + 1, &end);
    }
    if (*end) {
        throw llama_rq_layers_error("'" + s + "' is no layer and no range of layers, write 3, -1 or 0-2");
    }
    return res;
}

std::vector<llama_rq_entry> llama_rq_entries() {
    const char * env = getenv("LLAMA_RQ_LAYERS");

    std::string spec;
    for (const char * c = env ? env : ""; *c; ++c) {
        if (*c != ' ') {
            spec += *c;
        }
    }

    std::vector<llama_rq_entry> res;
    if (spec.empty()) {
        return res;
    }

    for (const std::string & part : llama_rq_split(spec, ';')) {
        const size_t colon = part.find(':');
        if (colon == std::string::npos) {
            throw llama_rq_layers_error("'" + part + "' is not LAYERS:TYPE or LAYERS:TYPE_K/TYPE_V, as in 0-1,-1:q8_0");
        }

        llama_rq_entry entry;
        for (const std::string & range : llama_rq_split(part.substr(0, colon), ',')) {
            entry.layers.push_back(llama_rq_range_from_str(range));
        }

        const std::string types = part.substr(colon + 1);
        const size_t slash = types.find('/');
        entry.type_k = llama_rq_type_from_name(types.substr(0, slash));
        entry.type_v = slash == std::string::npos ? entry.type_k : llama_rq_type_from_name(types.substr(slash + 1));

        res.push_back(entry);
    }

    return res;
}

// the layers of a range where there are n of them, ascending
static std::vector<int> llama_rq_indices(const llama_rq_entry::range & range, int n) {
    for (int i : { range.first, range.last }) {
        if (i < -n || i >= n) {
            throw llama_rq_layers_error("there is no layer " + std::to_string(i) + ", the model has " + std::to_string(n) +
                    " with a KV cache, 0 to " + std::to_string(n - 1));
        }
    }

    const int first = range.first < 0 ? range.first + n : range.first;
    const int last  = range.last  < 0 ? range.last  + n : range.last;
    if (first > last) {
        throw llama_rq_layers_error("the range " + std::to_string(range.first) + "-" + std::to_string(range.last) + " runs backwards");
    }

    std::vector<int> res;
    for (int i = first; i <= last; ++i) {
        res.push_back(i);
    }
    return res;
}

std::vector<int32_t> llama_rq_counted_layers(const llama_hparams & hparams, const std::function<bool(int32_t il)> & filter) {
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

std::map<int32_t, std::pair<ggml_type, ggml_type>> llama_rq_types_by_layer(const llama_hparams & hparams,
        const std::vector<llama_rq_entry> & entries, const std::vector<int32_t> & counted) {
    std::map<int32_t, std::pair<ggml_type, ggml_type>> res;

    for (const auto & entry : entries) {
        for (const auto & range : entry.layers) {
            for (int i : llama_rq_indices(range, (int) counted.size())) {
                res[counted[i]] = { entry.type_k, entry.type_v };
            }
        }
    }

    for (size_t i = 0; i < counted.size(); ++i) {
        const auto it = res.find(counted[i]);
        if (it == res.end()) {
            continue;
        }
        const auto [type_k, type_v] = it->second;
        const int64_t head_k = hparams.n_embd_head_k(it->first);
        const int64_t head_v = hparams.n_embd_head_v(it->first);
        if (head_k % ggml_blck_size(ggml_rq_type_for_head(type_k, head_k)) != 0 || head_v % ggml_blck_size(ggml_rq_type_for_head(type_v, head_v)) != 0) {
            throw llama_rq_layers_error("heads of layer " + std::to_string(i) + " do not fill whole blocks of " +
                    ggml_type_name(type_k) + " or " + ggml_type_name(type_v) + ", use f16");
        }
    }
    return res;
}
