#pragma once

// Rotated cache types on the CPU: quantization of rows as they are written, dot products with q8_0 rows, and the
// fast form of the rotations.

#include "ggml-rq-types.h"
#include "ggml-cpu-impl.h"

#ifdef __cplusplus
extern "C" {
#endif

void quantize_row_rq2(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void quantize_row_rq3(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void quantize_row_rq4(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void quantize_row_rq5(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

void quantize_row_rq2_64(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void quantize_row_rq3_64(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void quantize_row_rq4_64(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void quantize_row_rq5_64(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

// ggml-rq.c compiled for this CPU, see rq-native.c
void ggml_rq_native_quantize_row_rq2(const float * GGML_RESTRICT x, block_rq2 * GGML_RESTRICT y, int64_t k);
void ggml_rq_native_quantize_row_rq3(const float * GGML_RESTRICT x, block_rq3 * GGML_RESTRICT y, int64_t k);
void ggml_rq_native_quantize_row_rq4(const float * GGML_RESTRICT x, block_rq4 * GGML_RESTRICT y, int64_t k);
void ggml_rq_native_quantize_row_rq5(const float * GGML_RESTRICT x, block_rq5 * GGML_RESTRICT y, int64_t k);
void ggml_rq_native_quantize_row_rq2_64(const float * GGML_RESTRICT x, block_rq2_64 * GGML_RESTRICT y, int64_t k);
void ggml_rq_native_quantize_row_rq3_64(const float * GGML_RESTRICT x, block_rq3_64 * GGML_RESTRICT y, int64_t k);
void ggml_rq_native_quantize_row_rq4_64(const float * GGML_RESTRICT x, block_rq4_64 * GGML_RESTRICT y, int64_t k);
void ggml_rq_native_quantize_row_rq5_64(const float * GGML_RESTRICT x, block_rq5_64 * GGML_RESTRICT y, int64_t k);
bool ggml_rq_native_rotate_row(int family, int mode, const float * x, float * y, int64_t n);

// s = sum of x[i]*y[i] over n values (whole blocks); vx: block_rqN, vy: block_q8_0; nrc is 1
void ggml_vec_dot_rq2_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_rq3_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_rq4_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_rq5_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);

void ggml_vec_dot_rq2_64_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_rq3_64_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_rq4_64_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_rq5_64_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);

// GET_ROWS from a tensor of ours
void ggml_compute_forward_rq_get_rows(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// a MUL_MAT that carries ggml_rq_hint(): dst = rotation of the rows of src1 (F32), src0 is not read
void ggml_compute_forward_rq_rotate(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}

#include "ggml-backend.h"

#include <vector>

// FLASH_ATTN_EXT with a K or V of ours or with recent rows; false, on every thread alike, if the op is not for it:
// upstream's goes on
bool ggml_compute_forward_rq_flash_attn_ext(const ggml_compute_params * params, ggml_tensor * dst);

// the bytes that it works in; false where those that upstream plans for the op do
bool ggml_rq_flash_attn_ext_work_size(int n_threads, const ggml_tensor * dst, size_t & size);

// into the list of extra buffer types, see rq-traits.cpp
void ggml_backend_cpu_push_rq_buffer_type(std::vector<ggml_backend_buffer_type_t> & types);
#endif
