#include "rq.cuh"
#include "rq-fattn.cuh"
#include "rq-fattn-vec.cuh"
#include "rq-kernels.cuh"
#include "rq-recent.cuh"
#include "rq-fuse.h"

// Eight columns at a time, up to so many times; above, K and V are unpacked once, to f16, for upstream's kernels. An estimate,
// not measured: unpacking takes 2.7 instructions of a lane per value and eight columns, that is 0.026 clocks of a
// multiprocessor at 80 % of its rate of issue; the way over f16 moves 4.4 bytes per value, 0.38 clocks of one of an H100 or
// A100 at 80 % of their bandwidth, and more on cards with less of it. They meet at 14.
#define GGML_CUDA_RQ_FA_MAX_TILES 12

// the one of these that is for K of this type, or nullptr
template <typename F>
static F * ggml_cuda_rq_fa_of(const ggml_type type_k, F * f16, F * q8_0, F * const (&ours)[6]) {
    return type_k == GGML_TYPE_F16 ? f16 : type_k == GGML_TYPE_Q8_0 ? q8_0 : !ggml_rq_is_type(type_k) || ggml_rq_has_5_bits(type_k) ? nullptr :
        ours[ggml_rq_type_bits(type_k) - 2 + (ggml_rq_is_sibling(type_k) ? 3 : 0)];
}

static ggml_cuda_rq_fa_kernel ggml_cuda_rq_fa_find(const ggml_tensor * K, const ggml_tensor * V) {
    static ggml_cuda_rq_fa_find_t * const ours[] = {
        ggml_cuda_rq_fa_find_rq2,    ggml_cuda_rq_fa_find_rq3,    ggml_cuda_rq_fa_find_rq4,
        ggml_cuda_rq_fa_find_rq2_64, ggml_cuda_rq_fa_find_rq3_64, ggml_cuda_rq_fa_find_rq4_64,
    };
    const auto find = K->type == GGML_TYPE_Q4_0 ? ggml_cuda_rq_fa_find_q4_0 : ggml_cuda_rq_fa_of(K->type, ggml_cuda_rq_fa_find_f16, ggml_cuda_rq_fa_find_q8_0, ours);
    return find ? find(K->ne[0], V->ne[0], V->type) : ggml_cuda_rq_fa_kernel{};
}

static ggml_cuda_rq_fa_vec_t ggml_cuda_rq_fa_vec_find(const ggml_tensor * K, const ggml_tensor * V) {
    static ggml_cuda_rq_fa_vec_find_t * const ours[] = {
        ggml_cuda_rq_fa_vec_find_rq2,    ggml_cuda_rq_fa_vec_find_rq3,    ggml_cuda_rq_fa_vec_find_rq4,
        ggml_cuda_rq_fa_vec_find_rq2_64, ggml_cuda_rq_fa_vec_find_rq3_64, ggml_cuda_rq_fa_vec_find_rq4_64,
    };
    const auto find = ggml_cuda_rq_fa_of(K->type, ggml_cuda_rq_fa_vec_find_f16, ggml_cuda_rq_fa_vec_find_q8_0, ours);
    return find && K->ne[0] == V->ne[0] ? find(K->ne[0], V->type) : nullptr;
}

static int ggml_cuda_rq_fa_heads_of(const ggml_tensor * dst) {
    return ggml_cuda_rq_fa_heads(dst->src[0]->ne[2]/dst->src[1]->ne[2]);
}

static bool ggml_cuda_rq_fa_has_ours(const ggml_tensor * dst) {
    return ggml_rq_is_type(dst->src[1]->type) || ggml_rq_is_type(dst->src[2]->type);
}

// whether a kernel of ours would be the right one, if there is one
static bool ggml_cuda_rq_fa_is_for_us(const ggml_tensor * dst) {
    const int     heads   = ggml_cuda_rq_fa_heads_of(dst);
    const int64_t queries = GGML_CUDA_RQ_FA_COLS/heads; // of a CUDA block
    if (!ggml_cuda_rq_fa_has_ours(dst) && !ggml_rq_has_recent(dst)) {
        return false;
    }
    if (ggml_rq_v_in_k(dst)) { // K is unpacked twice, where the other way has one copy for both; all heads share it
        const int64_t group = dst->src[0]->ne[2]/dst->src[1]->ne[2];
        return (group + heads - 1)/heads*((dst->src[0]->ne[1] + queries - 1)/queries) <= GGML_CUDA_RQ_FA_MAX_TILES/2;
    }
    return dst->src[0]->ne[1] <= GGML_CUDA_RQ_FA_MAX_TILES*queries;
}

// the vector kernel for this node, or nullptr: it takes a column at a time, and rows without a check for the last of them
static ggml_cuda_rq_fa_vec_t ggml_cuda_rq_fa_vec_for(const int device, const ggml_tensor * dst) {
    const ggml_tensor * Q = dst->src[0];
    const ggml_tensor * K = dst->src[1];
    if (!ggml_cuda_rq_fa_has_ours(dst) || turing_mma_available(ggml_cuda_info().devices[device].cc) || Q->ne[1] > 2 || K->ne[1] % FATTN_KQ_STRIDE != 0) {
        return nullptr;
    }
    return ggml_cuda_rq_fa_vec_find(K, dst->src[2]);
}

bool ggml_cuda_rq_use_flash_attn(const int device, const ggml_tensor * dst) {
    const ggml_tensor * K    = dst->src[1];
    const ggml_tensor * V    = dst->src[2];
    const ggml_tensor * mask = dst->src[3];

    for (const int i : { 1, 2, (int) GGML_RQ_RECENT_K, (int) GGML_RQ_RECENT_V, (int) GGML_RQ_RECENT_K_NEW, (int) GGML_RQ_RECENT_V_NEW }) {
        const ggml_tensor * t = dst->src[i];
        // not the address: where memory is planned there is none yet
        if (t && !ggml_is_quantized(t->type) && (t->nb[1] % 16 != 0 || t->nb[2] % 16 != 0 || t->nb[3] % 16 != 0 || t->view_offs % 16 != 0)) {
            return false;
        }
    }
    if (mask && mask->ne[2] != 1) {
        return false;
    }
    return ggml_cuda_rq_fa_vec_for(device, dst) != nullptr ||
        (ggml_cuda_rq_fa_is_for_us(dst) && turing_mma_available(ggml_cuda_info().devices[device].cc) &&
            ggml_cuda_rq_fa_find(K, V).kernel != nullptr);
}

size_t ggml_cuda_rq_flash_attn_size(const int device, const ggml_tensor * dst) {
    return ggml_cuda_rq_use_flash_attn(device, dst) ? ggml_nbytes(dst) : ggml_rq_has_recent(dst) ? ggml_cuda_rq_recent_size(dst) : 0;
}

void ggml_cuda_rq_warn_flash_attn(const int device, const ggml_tensor * dst) {
    static bool warned = false;
    // where so many heads share K that the other way is the faster one, there is nothing to warn of
    const bool is_choice = turing_mma_available(ggml_cuda_info().devices[device].cc) && ggml_cuda_rq_fa_find(dst->src[1], dst->src[2]).kernel && !ggml_cuda_rq_fa_is_for_us(dst);
    if (!warned && !is_choice && dst->src[0]->ne[1] == 1 && (ggml_cuda_rq_fa_has_ours(dst) || ggml_rq_has_recent(dst))) {
        warned = true;
        GGML_LOG_WARN("%s: no attention kernel for K in %s and V in %s at head_dim %d on this device: they are converted to f16 for every token (slow)\n",
            __func__, ggml_type_name(dst->src[1]->type), ggml_type_name(dst->src[2]->type), (int) dst->src[0]->ne[0]);
    }
}

// rot: the rotation of the output, to be written in place of it, or nullptr
static void ggml_cuda_rq_fa_launch(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * rot, const ggml_cuda_rq_fa_kernel & k) {
    const ggml_tensor * Q     = dst->src[0];
    const ggml_tensor * K     = dst->src[1];
    const ggml_tensor * V     = dst->src[2];
    const ggml_tensor * mask  = dst->src[3];
    const ggml_tensor * sinks = dst->src[4];
    GGML_ASSERT(Q->type == GGML_TYPE_F32 && Q->nb[0] == sizeof(float) && (!mask || mask->type == GGML_TYPE_F16));

    const int64_t group   = Q->ne[2]/K->ne[2];
    const int64_t heads   = ggml_cuda_rq_fa_heads(group); // of a tile
    const int64_t tiles_x = (Q->ne[1]*heads + GGML_CUDA_RQ_FA_COLS - 1)/GGML_CUDA_RQ_FA_COLS;
    const int64_t tiles_z = (group + heads - 1)/heads*K->ne[2]*Q->ne[3];

    k.prepare();
    ggml_cuda_rq_recent recent = ggml_cuda_rq_make_recent(dst);
    recent.parts = (recent.n + k.rows_recent - 1)/k.rows_recent;
    const int nb_shared = recent.parts > 0 ? k.nb_recent : k.nb_shared;
    int per_sm = 0;
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, k.kernel, WARP_SIZE*GGML_CUDA_RQ_FA_WARPS, nb_shared));
    GGML_ASSERT(per_sm > 0);
    const int64_t tiles  = tiles_x*tiles_z;
    const int64_t places = (int64_t) per_sm*ggml_cuda_info().devices[ctx.device].nsm - tiles*recent.parts; // those for recent rows beside the others
    const int     parts  = ggml_cuda_rq_parts(tiles, std::max<int64_t>(places, 1), (K->ne[1] + k.rows - 1)/k.rows) + recent.parts;

    const int64_t rows = ggml_nrows(dst);
    ggml_cuda_pool_alloc<float>  part(ctx.pool());
    ggml_cuda_pool_alloc<float2> meta(ctx.pool());
    const bool combine = parts > 1 || rot;
    if (combine) {
        part.alloc(rows*parts*V->ne[0]);
        meta.alloc(rows*parts);
    }

    float scale;
    float max_bias;
    float logit_softcap;
    memcpy(&scale,         (const float *) dst->op_params + 0, sizeof(float));
    memcpy(&max_bias,      (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&logit_softcap, (const float *) dst->op_params + 2, sizeof(float));
    if (logit_softcap != 0.0f) {
        scale /= logit_softcap;
    }
    const uint32_t n_head_log2 = 1u << (uint32_t) floorf(log2f((float) Q->ne[2])); // ALiBi, as everywhere in ggml
    const float    m0 = powf(2.0f, -max_bias/n_head_log2);
    const float    m1 = powf(2.0f, -max_bias/2.0f/n_head_log2);

    const dim3 warps(WARP_SIZE, GGML_CUDA_RQ_FA_WARPS, 1);
    ggml_cuda_kernel_launch(k.kernel, ggml_cuda_kernel_launch_params(dim3(tiles_x, parts, tiles_z), warps, nb_shared, ctx.stream()),
        (const char *) Q->data, (const char *) K->data, (const char *) V->data, mask ? (const char *) mask->data : nullptr,
        sinks ? (const char *) sinks->data : nullptr, (const int *) nullptr, combine ? part.ptr : (float *) dst->data, meta.ptr,
        scale, max_bias, m0, m1, n_head_log2, logit_softcap,
        Q->ne[0], init_fastdiv_values(Q->ne[1]), Q->ne[2], Q->ne[3], Q->nb[1], Q->nb[2], Q->nb[3],
        K->ne[0], K->ne[1], K->ne[2], K->ne[3], K->nb[1], K->nb[2], K->nb[3],
        V->nb[1], V->nb[2], V->nb[3],
        mask ? mask->ne[1] : 0, mask ? mask->ne[2] : 0, mask ? mask->ne[3] : 0, mask ? mask->nb[1] : 0, mask ? mask->nb[2] : 0, mask ? mask->nb[3] : 0,
        recent);
    if (combine) {
        const int32_t hint  = rot ? ggml_get_op_params_i32(rot, 1) : 0;
        const int64_t n     = rot ? rot->ne[0] : V->ne[0] % 256 == 0 ? 256 : V->ne[0] % 128 == 0 ? 128 : 64; // values that a warp, or half of one, takes
        const int64_t units = V->ne[0]/n;
        const auto   kernel = n == 256 ? ggml_cuda_rq_combine_kernel<256> : n == 128 ? ggml_cuda_rq_combine_kernel<128> : ggml_cuda_rq_combine_kernel<64>;
        ggml_cuda_kernel_launch(kernel, ggml_cuda_rq_launch_params((rows*units*ggml_cuda_rq_lanes(n) + WARP_SIZE - 1)/WARP_SIZE, ctx.stream()),
            (const float *) part.ptr, (const float2 *) meta.ptr, (float *) (rot ? rot : dst)->data, rows, init_fastdiv_values(units), parts,
            rot ? (int) ggml_rq_hint_family(hint) : -1, (int) ggml_rq_hint_mode(hint));
    }
}

static void ggml_cuda_rq_fa_run(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * rot) {
    ggml_cuda_set_device(ctx.device);
    const ggml_cuda_rq_fa_kernel kernel = ggml_cuda_rq_fa_find(dst->src[1], dst->src[2]);
    GGML_ASSERT(kernel.kernel != nullptr);
    ggml_cuda_rq_fa_launch(ctx, dst, rot, kernel);
}

void ggml_cuda_rq_flash_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (const ggml_cuda_rq_fa_vec_t vec = ggml_cuda_rq_fa_vec_for(ctx.device, dst)) {
        ggml_cuda_set_device(ctx.device);
        vec(ctx, dst);
    } else {
        ggml_cuda_rq_fa_run(ctx, dst, nullptr);
    }
}

int ggml_cuda_rq_flash_attn_rotated(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i) {
    const ggml_tensor * dst     = graph->nodes[i];
    int                 n_nodes = 0;
    const ggml_tensor * rot     = ggml_cuda_rq_rotation_of(graph, i, n_nodes);
    if (!rot || !ggml_cuda_rq_use_flash_attn(ctx.device, dst) || ggml_cuda_rq_fa_vec_for(ctx.device, dst)) {
        return 0;
    }
    ggml_cuda_rq_fa_run(ctx, dst, rot);
    return n_nodes;
}
