#pragma once

// Rotated cache types on CUDA and HIP: what the hooks call.

#include "common.cuh"
#include "convert.cuh"

// runs the node if it is ours: SET_ROWS, GET_ROWS, CPY, CONT, DUP with our types, FLASH_ATTN_EXT with a K or V of ours where
// our kernel is the right one, MUL_MAT with a rotation of ours
bool ggml_cuda_rq_compute_forward(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// runs what goes together from node i on (rq-fuse.h); returns how many nodes after i are done with it, 0 where there is nothing
// to fuse
int ggml_cuda_rq_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i);

// whether we have a say in this node; supported then tells whether it runs on the device
bool ggml_cuda_rq_decides(int device, const ggml_tensor * op, bool & supported);

bool ggml_cuda_rq_is_type(ggml_type type);

// nullptr for a type that is not ours
to_fp16_cuda_t    ggml_cuda_rq_to_fp16   (ggml_type type);
to_fp16_nc_cuda_t ggml_cuda_rq_to_fp16_nc(ggml_type type);

// whether a kernel that reads our types takes this FLASH_ATTN_EXT; upstream's others, over K and V in f16, take the rest
bool ggml_cuda_rq_use_flash_attn(int device, const ggml_tensor * dst);
void ggml_cuda_rq_flash_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// with recent rows (ggml-rq-types.h), by upstream's kernels
bool ggml_cuda_rq_supports_recent(int device, const ggml_tensor * dst);
void ggml_cuda_rq_flash_attn_recent(ggml_backend_cuda_context & ctx, const ggml_tensor * dst);
size_t ggml_cuda_rq_recent_size(const ggml_tensor * dst);

// the memory that this FLASH_ATTN_EXT takes, or 0 for what upstream says
size_t ggml_cuda_rq_flash_attn_size(int device, const ggml_tensor * dst);

// for node i of a kernel of ours together with the rotation of its output; returns how many nodes after i are done, 0 for none and nothing run
int ggml_cuda_rq_flash_attn_rotated(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i);

// says once that a decode goes the slow way: a head_dim or a form of the cache that no kernel of ours takes
void ggml_cuda_rq_warn_flash_attn(int device, const ggml_tensor * dst);

// for the kernels of rq-kernels.cuh
ggml_cuda_kernel_launch_params ggml_cuda_rq_launch_params(int64_t warps, cudaStream_t stream);
