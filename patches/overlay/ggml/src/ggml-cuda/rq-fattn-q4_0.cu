#include "rq-fattn.cuh"

ggml_cuda_rq_fa_kernel ggml_cuda_rq_fa_find_q4_0(const int64_t head_dim_k, const int64_t head_dim_v, const ggml_type type_v) {
    return type_v == GGML_TYPE_Q4_0 ? ggml_cuda_rq_fa_find_same<ggml_cuda_rq_kv_q4_0>(head_dim_k, head_dim_v) : ggml_cuda_rq_fa_kernel{};
}
