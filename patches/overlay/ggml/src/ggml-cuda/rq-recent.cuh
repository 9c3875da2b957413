#pragma once

// Attention with recent rows (ggml-rq-types.h), as far as the host is concerned.

#include "rq-device.cuh"
#include "fattn-common.cuh"

// what a kernel is told of them, with 0 parts; without recent rows all is 0
ggml_cuda_rq_recent ggml_cuda_rq_make_recent(const ggml_tensor * dst);

// the rows of the cache by upstream's vector kernel, which takes so many queries at a time, and the recent rows where its parts are put together
void ggml_cuda_rq_fa_vec_recent(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, fattn_kernel_t kernel, int cols);
