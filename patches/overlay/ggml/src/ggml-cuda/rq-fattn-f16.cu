#include "rq-fattn.cuh"
#include "rq-fattn-vec.cuh"

ggml_cuda_rq_fa_kernel ggml_cuda_rq_fa_find_f16(const int64_t head_dim_k, const int64_t head_dim_v, const ggml_type type_v) {
    const ggml_cuda_rq_fa_kernel res = ggml_cuda_rq_fa_find<ggml_cuda_rq_kv_f16, false>(head_dim_k, head_dim_v, type_v);
    return res.kernel ? res : ggml_cuda_rq_fa_find_64<ggml_cuda_rq_kv_f16, false>(head_dim_k, head_dim_v, type_v);
}

ggml_cuda_rq_fa_vec_t ggml_cuda_rq_fa_vec_find_f16(const int64_t head_dim, const ggml_type type_v) {
    return head_dim == 64 ? ggml_cuda_rq_fa_vec_find_64<GGML_TYPE_F16>(head_dim, type_v) : ggml_cuda_rq_fa_vec_find<GGML_TYPE_F16>(head_dim, type_v);
}
