// stand-in for what our kernels use of ggml-common.h, with half as CUDA has it
#pragma once

#include "../emulator.h"

typedef half ggml_half;

#define QK8_0 32
typedef struct { ggml_half d; int8_t qs[QK8_0]; } block_q8_0;

#define QK4_0 32
typedef struct { ggml_half d; uint8_t qs[QK4_0/2]; } block_q4_0;
