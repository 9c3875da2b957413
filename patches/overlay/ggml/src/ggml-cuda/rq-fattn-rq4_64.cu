#include "rq-fattn.cuh"
#include "rq-fattn-vec.cuh"

ggml_cuda_rq_fa_kernel ggml_cuda_rq_fa_find_rq4_64(const int64_t head_dim_k, const int64_t head_dim_v, const ggml_type type_v) {
    return ggml_cuda_rq_fa_find_64<ggml_cuda_rq_kv<4, QK_RQ_64>, true>(head_dim_k, head_dim_v, type_v);
}

ggml_cuda_rq_fa_vec_t ggml_cuda_rq_fa_vec_find_rq4_64(const int64_t head_dim, const ggml_type type_v) {
    return ggml_cuda_rq_fa_vec_find_64<GGML_TYPE_RQ4_64>(head_dim, type_v);
}
