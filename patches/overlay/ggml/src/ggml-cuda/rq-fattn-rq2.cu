#include "rq-fattn.cuh"

ggml_cuda_rq_fa_kernel ggml_cuda_rq_fa_find_rq2(const int64_t head_dim, const ggml_type type_v) {
    return ggml_cuda_rq_fa_find<ggml_cuda_rq_kv<2>, true>(head_dim, type_v);
}
