#include "rq-fattn.cuh"
#include "rq-fattn-vec.cuh"

ggml_cuda_rq_fa_kernel ggml_cuda_rq_fa_find_q8_0(const int64_t head_dim, const ggml_type type_v) {
    return type_v == GGML_TYPE_Q8_0 ? ggml_cuda_rq_fa_find_same<ggml_cuda_rq_kv_q8_0>(head_dim) : ggml_cuda_rq_fa_find<ggml_cuda_rq_kv_q8_0, false>(head_dim, type_v);
}

ggml_cuda_rq_fa_vec_t ggml_cuda_rq_fa_vec_find_q8_0(const int64_t head_dim, const ggml_type type_v) {
    return ggml_cuda_rq_fa_vec_find<GGML_TYPE_Q8_0>(head_dim, type_v);
}
