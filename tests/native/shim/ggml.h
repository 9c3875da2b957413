// stand-in for the parts of ggml.h that ggml-rq.c uses, to test it without llama.cpp
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#define GGML_API __declspec(dllexport) extern
#else
#define GGML_API extern
#endif
#define GGML_RESTRICT restrict
#define GGML_UNUSED(x) (void) (x)
