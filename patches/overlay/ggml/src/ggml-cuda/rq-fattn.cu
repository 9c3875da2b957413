#include "rq.cuh"
#include "rq-fattn.cuh"
#include "rq-fattn-vec.cuh"

// columns of eight from which on unpacking K and V once, to f16, for upstream's kernels is taken to be cheaper than once per eight
// columns; not measured yet
#define GGML_CUDA_RQ_FA_MAX_TILES 4

static ggml_cuda_rq_fa_kernel ggml_cuda_rq_fa_find(const int64_t head_dim, const ggml_type type_k, const ggml_type type_v) {
    if (type_k == GGML_TYPE_F16) {
        return ggml_cuda_rq_fa_find_f16(head_dim, type_v);
    }
    if (type_k == GGML_TYPE_Q8_0) {
        return ggml_cuda_rq_fa_find_q8_0(head_dim, type_v);
    }
    if (!ggml_rq_is_type(type_k)) {
        return {};
    }
    switch ((type_k - GGML_TYPE_PLANAR2) % 3) {
        case 0:  return ggml_cuda_rq_fa_find_rq2(head_dim, type_v);
        case 1:  return ggml_cuda_rq_fa_find_rq3(head_dim, type_v);
        default: return ggml_cuda_rq_fa_find_rq4(head_dim, type_v);
    }
}

static ggml_cuda_rq_fa_vec_t ggml_cuda_rq_fa_vec_find(const int64_t head_dim, const ggml_type type_k, const ggml_type type_v) {
    if (type_k == GGML_TYPE_F16) {
        return ggml_cuda_rq_fa_vec_find_f16(head_dim, type_v);
    }
    if (type_k == GGML_TYPE_Q8_0) {
        return ggml_cuda_rq_fa_vec_find_q8_0(head_dim, type_v);
    }
    if (!ggml_rq_is_type(type_k)) {
        return nullptr;
    }
    switch ((type_k - GGML_TYPE_PLANAR2) % 3) {
        case 0:  return ggml_cuda_rq_fa_vec_find_rq2(head_dim, type_v);
        case 1:  return ggml_cuda_rq_fa_vec_find_rq3(head_dim, type_v);
        default: return ggml_cuda_rq_fa_vec_find_rq4(head_dim, type_v);
    }
}

static int ggml_cuda_rq_fa_heads_of(const ggml_tensor * dst) {
    return ggml_cuda_rq_fa_heads(dst->src[0]->ne[2]/dst->src[1]->ne[2]);
}

// whether a kernel of ours would be the right one, if there is one
static bool ggml_cuda_rq_fa_is_for_us(const ggml_tensor * dst) {
    const int64_t queries = GGML_CUDA_RQ_FA_COLS/ggml_cuda_rq_fa_heads_of(dst); // of a CUDA block
    return (ggml_rq_is_type(dst->src[1]->type) || ggml_rq_is_type(dst->src[2]->type)) &&
        dst->src[0]->ne[1] <= GGML_CUDA_RQ_FA_MAX_TILES*queries;
}

// the vector kernel for this node, or nullptr: it takes a column at a time, and rows without a check for the last of them
static ggml_cuda_rq_fa_vec_t ggml_cuda_rq_fa_vec_for(const int device, const ggml_tensor * dst) {
    const ggml_tensor * Q = dst->src[0];
    const ggml_tensor * K = dst->src[1];
    const bool for_us = ggml_rq_is_type(K->type) || ggml_rq_is_type(dst->src[2]->type);
    if (!for_us || turing_mma_available(ggml_cuda_info().devices[device].cc) || Q->ne[1] > 2 || K->ne[1] % FATTN_KQ_STRIDE != 0) {
        return nullptr;
    }
    return ggml_cuda_rq_fa_vec_find(Q->ne[0], K->type, dst->src[2]->type);
}

bool ggml_cuda_rq_use_flash_attn(const int device, const ggml_tensor * dst) {
    const ggml_tensor * Q    = dst->src[0];
    const ggml_tensor * K    = dst->src[1];
    const ggml_tensor * V    = dst->src[2];
    const ggml_tensor * mask = dst->src[3];

    for (const ggml_tensor * t : { K, V }) { // not the address: where memory is planned there is none yet
        if (t->type == GGML_TYPE_F16 && (t->nb[1] % 16 != 0 || t->nb[2] % 16 != 0 || t->nb[3] % 16 != 0 || t->view_offs % 16 != 0)) {
            return false;
        }
    }
    if (Q->ne[0] != V->ne[0] || (mask && mask->ne[2] != 1)) {
        return false;
    }
    return ggml_cuda_rq_fa_vec_for(device, dst) != nullptr ||
        (ggml_cuda_rq_fa_is_for_us(dst) && turing_mma_available(ggml_cuda_info().devices[device].cc) &&
            ggml_cuda_rq_fa_find(Q->ne[0], K->type, V->type).kernel != nullptr);
}

void ggml_cuda_rq_warn_flash_attn(const ggml_tensor * dst) {
    static bool warned = false;
    if (!warned && dst->src[0]->ne[1] == 1 && (ggml_rq_is_type(dst->src[1]->type) || ggml_rq_is_type(dst->src[2]->type))) {
        warned = true;
        GGML_LOG_WARN("%s: no attention kernel for K in %s and V in %s at head_dim %d on this device: they are converted to f16 for every token (slow)\n",
            __func__, ggml_type_name(dst->src[1]->type), ggml_type_name(dst->src[2]->type), (int) dst->src[0]->ne[0]);
    }
}

template <int D>
static void ggml_cuda_rq_fa_launch(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const ggml_cuda_rq_fa_kernel & k) {
    constexpr int warps = GGML_CUDA_RQ_FA_WARPS;
    switch (ggml_cuda_rq_fa_heads_of(dst)) {
        case 1:  launch_fattn<D, 8, 1>(ctx, dst, k.kernel, warps, k.nb_shared, k.rows, false, false, false, false); break;
        case 2:  launch_fattn<D, 4, 2>(ctx, dst, k.kernel, warps, k.nb_shared, k.rows, false, false, false, false); break;
        case 4:  launch_fattn<D, 2, 4>(ctx, dst, k.kernel, warps, k.nb_shared, k.rows, false, false, false, false); break;
        default: launch_fattn<D, 1, 8>(ctx, dst, k.kernel, warps, k.nb_shared, k.rows, false, false, false, false); break;
    }
}

void ggml_cuda_rq_flash_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    ggml_cuda_set_device(ctx.device);
    if (const ggml_cuda_rq_fa_vec_t vec = ggml_cuda_rq_fa_vec_for(ctx.device, dst)) {
        vec(ctx, dst);
        return;
    }
    const int64_t head_dim = dst->src[0]->ne[0];
    const ggml_cuda_rq_fa_kernel kernel = ggml_cuda_rq_fa_find(head_dim, dst->src[1]->type, dst->src[2]->type);
    GGML_ASSERT(kernel.kernel != nullptr);
    kernel.prepare();
    if (head_dim == 128) {
        ggml_cuda_rq_fa_launch<128>(ctx, dst, kernel);
    } else {
        ggml_cuda_rq_fa_launch<256>(ctx, dst, kernel);
    }
}
