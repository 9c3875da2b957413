// stand-in for what our block structs take from ggml-common.h
#pragma once

#include <assert.h>
#include <stdint.h>

typedef uint16_t ggml_half;
