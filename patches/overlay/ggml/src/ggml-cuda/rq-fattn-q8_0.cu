#include "rq-fattn.cuh"
#include "rq-fattn-vec.cuh"

ggml_cuda_rq_fa_kernel ggml_cuda_rq_fa_find_q8_0(const int64_t head_dim_k, const int64_t head_dim_v, const ggml_type type_v) {
    if (type_v == GGML_TYPE_Q8_0) {
        return ggml_cuda_rq_fa_find_same<ggml_cuda_rq_kv_q8_0>(head_dim_k, head_dim_v);
    }
    const ggml_cuda_rq_fa_kernel res = ggml_cuda_rq_fa_find<ggml_cuda_rq_kv_q8_0, false>(head_dim_k, head_dim_v, type_v);
    return res.kernel ? res : ggml_cuda_rq_fa_find_64<ggml_cuda_rq_kv_q8_0, false>(head_dim_k, head_dim_v, type_v);
}

ggml_cuda_rq_fa_vec_t ggml_cuda_rq_fa_vec_find_q8_0(const int64_t head_dim, const ggml_type type_v) {
    return head_dim == 64 ? ggml_cuda_rq_fa_vec_find_64<GGML_TYPE_Q8_0>(head_dim, type_v) : ggml_cuda_rq_fa_vec_find<GGML_TYPE_Q8_0>(head_dim, type_v);
}
