// ggml-rq.c once more, compiled with the flags of this CPU variant: its loops are written for the vectorizer, and
// its encoder works on integers, so that the bytes are those of the reference

#include "ggml.h"

#undef  GGML_API
#define GGML_API extern

#define quantize_row_rq2_ref    ggml_rq_native_quantize_row_rq2
#define quantize_row_rq3_ref    ggml_rq_native_quantize_row_rq3
#define quantize_row_rq4_ref    ggml_rq_native_quantize_row_rq4
#define dequantize_row_rq2      ggml_rq_native_dequantize_row_rq2
#define dequantize_row_rq3      ggml_rq_native_dequantize_row_rq3
#define dequantize_row_rq4      ggml_rq_native_dequantize_row_rq4
#define quantize_rq2            ggml_rq_native_quantize_rq2
#define quantize_rq3            ggml_rq_native_quantize_rq3
#define quantize_rq4            ggml_rq_native_quantize_rq4
#define ggml_rq_rotation_matrix ggml_rq_native_rotation_matrix
#define ggml_rq_rotate_row      ggml_rq_native_rotate_row

#include "../ggml-rq.c"
