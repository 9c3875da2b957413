// stand-in for the block structs that the patch adds to ggml-common.h
#pragma once

#include <assert.h>
#include <stdint.h>

typedef uint16_t ggml_half;

#define QK_RQ 128
typedef struct { ggml_half d; uint8_t qs[QK_RQ/4]; } block_rq2;
typedef struct { ggml_half d; uint8_t qs[QK_RQ/4]; uint8_t qh[QK_RQ/8]; } block_rq3;
typedef struct { ggml_half d; uint8_t qs[QK_RQ/2]; } block_rq4;
