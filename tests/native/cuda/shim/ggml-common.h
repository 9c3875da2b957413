// stand-in for the block structs of ggml-common.h, with half as CUDA has it
#pragma once

#include "../emulator.h"

typedef half ggml_half;

#define QK8_0 32
typedef struct { ggml_half d; int8_t qs[QK8_0]; } block_q8_0;

#define QK_RQ 128
typedef struct { ggml_half d; uint8_t qs[QK_RQ/4]; } block_rq2;
typedef struct { ggml_half d; uint8_t qs[QK_RQ/4]; uint8_t qh[QK_RQ/8]; } block_rq3;
typedef struct { ggml_half d; uint8_t qs[QK_RQ/2]; } block_rq4;
