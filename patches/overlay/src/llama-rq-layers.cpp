#include "llama-rq-layers.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

static const ggml_type LLAMA_RQ_CACHE_TYPES[] = {
    GGML_TYPE_F32,     GGML_TYPE_F16,     GGML_TYPE_BF16,
    GGML_TYPE_Q8_0,    GGML_TYPE_Q4_0,    GGML_TYPE_Q4_1,  GGML_TYPE_IQ4_NL, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1,
    GGML_TYPE_PLANAR2, GGML_TYPE_PLANAR3, GGML_TYPE_PLANAR4,
    GGML_TYPE_ISO2,    GGML_TYPE_ISO3,    GGML_TYPE_ISO4,
    GGML_TYPE_ROTOR2,  GGML_TYPE_ROTOR3,  GGML_TYPE_ROTOR4,
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

std::vector<int> llama_rq_indices(const llama_rq_entry::range & range, int n) {
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
