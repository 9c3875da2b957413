#pragma once

#include "ggml-cpp.h"

#include <map>
#include <utility>
#include <vector>

// Tensors that live as long as a cache, with a buffer for each type of buffer that they are in
class llama_rq_tensors {
public:
    explicit llama_rq_tensors(size_t n_max) : n_max(n_max) {} // tensors of a buffer type

    ggml_tensor * add(ggml_backend_buffer_type_t buft, ggml_type type, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1);

    // the same, f32 or f16, with the values that it is to have
    ggml_tensor * add(ggml_backend_buffer_type_t buft, ggml_type type, std::vector<float> values, int64_t ne0, int64_t ne1 = 1);

    // zeroed where no values were given; no_alloc: for a graph that is only measured; throws std::runtime_error
    void allocate(ggml_backend_buffer_usage usage, bool no_alloc);

    size_t n_bytes() const; // of all tensors

private:
    const size_t n_max;

    std::map<ggml_backend_buffer_type_t, std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> bufs;

    std::vector<std::pair<ggml_tensor *, std::vector<float>>> data;
};
