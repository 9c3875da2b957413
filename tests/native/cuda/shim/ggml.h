// stand-in for the parts of ggml.h that our kernels use
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define GGML_API
#define GGML_RESTRICT
#define GGML_ASSERT(x) ((void) (x))

enum ggml_type {
    GGML_TYPE_F32 = 0, GGML_TYPE_F16 = 1, GGML_TYPE_Q4_0 = 2, GGML_TYPE_Q8_0 = 8,
#include "ggml-rq-ids.h"
    GGML_RQ_TYPE_IDS,
};

typedef uint16_t ggml_fp16_t;

// ggml-rq-types.h looks into the attention's operation
enum ggml_op { GGML_OP_FLASH_ATTN_EXT = 1 };

struct ggml_tensor {
    enum ggml_type type;
    enum ggml_op   op;
    int64_t        ne[4];
    size_t         nb[4];
    ggml_tensor *  src[10];
    ggml_tensor *  view_src;
    size_t         view_offs;
};
