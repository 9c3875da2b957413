// The encoder and the rotations of ggml-rq.c once more, compiled with the flags of this CPU variant: their loops are
// written for the vectorizer, and the encoder works on integers, so that the bytes are those of the reference

#include "ggml.h"

#undef  GGML_API
#define GGML_API extern

#define GGML_RQ_NATIVE

#define quantize_row_rq2_ref ggml_rq_native_quantize_row_rq2
#define quantize_row_rq3_ref ggml_rq_native_quantize_row_rq3
#define quantize_row_rq4_ref ggml_rq_native_quantize_row_rq4
#define quantize_row_rq5_ref ggml_rq_native_quantize_row_rq5
#define quantize_row_rq2_64_ref ggml_rq_native_quantize_row_rq2_64
#define quantize_row_rq3_64_ref ggml_rq_native_quantize_row_rq3_64
#define quantize_row_rq4_64_ref ggml_rq_native_quantize_row_rq4_64
#define quantize_row_rq5_64_ref ggml_rq_native_quantize_row_rq5_64
#define ggml_rq_rotate_row   ggml_rq_native_rotate_row

#include "../ggml-rq.c"
