#pragma once

// The rotated cache types in upstream's tests: what they ask of a type.

#include "../ggml/src/ggml-rq-types.h"

// ggml_quantize_chunk does not know our types: nobody but tests would quantize weights to them
static size_t test_rq_quantize_chunk(ggml_type type, const float * src, void * dst, int64_t start, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    if (!ggml_rq_is_type(type)) {
        return ggml_quantize_chunk(type, src, dst, start, nrows, n_per_row, imatrix);
    }
    const size_t row_size = ggml_row_size(type, n_per_row);
    ggml_get_type_traits(type)->from_float_ref(src + start, (char *) dst + start/n_per_row*row_size, nrows*n_per_row);
    return nrows*row_size;
}
