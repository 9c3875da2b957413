#include "rq.cuh"
#include "rq-kernels.cuh"

#include "rq-recent.cuh"

#include "fattn.cuh"

// Attention with recent rows (ggml-rq-types.h) by upstream's kernels: K and V in f16 with these rows behind them, in the memory behind
// the result, under the tensor that both masks are views of.

struct ggml_cuda_rq_in_f16 {
    ggml_tensor k, v, mask;
    ggml_tensor node; // a FLASH_ATTN_EXT of upstream's over these
    size_t      size; // bytes from the result on

    explicit ggml_cuda_rq_in_f16(const ggml_tensor * dst);
    ggml_cuda_rq_in_f16(const ggml_cuda_rq_in_f16 &) = delete; // node points into it
};

ggml_cuda_rq_in_f16::ggml_cuda_rq_in_f16(const ggml_tensor * dst) {
    const int64_t rows = ggml_rq_recent_width(dst);
    GGML_ASSERT(rows > 0); // both masks are views of one tensor (llama-rq-recent.cpp sees to it)

    size = GGML_PAD(ggml_nbytes(dst), 256);
    const auto place = [&](const ggml_tensor * cells) {
        ggml_tensor t = *cells;
        t.type   = GGML_TYPE_F16;
        t.op     = GGML_OP_NONE;
        t.src[0] = nullptr;
        t.ne[1]  = rows;
        t.nb[0]  = sizeof(half);
        t.nb[2]  = t.ne[0]*t.nb[0];
        t.nb[1]  = t.ne[2]*t.nb[2];
        t.nb[3]  = t.ne[1]*t.nb[1];
        t.data   = (char *) dst->data + size;
        t.view_src  = nullptr;
        t.view_offs = 0;
        size += GGML_PAD(t.ne[3]*t.nb[3], 256);
        return t;
    };
    k = place(dst->src[1]);
    if (ggml_rq_v_in_k(dst)) {
        v = k;
        v.ne[0] = dst->src[2]->ne[0];
    } else {
        v = place(dst->src[2]);
    }

    mask = *dst->src[3];
    mask.ne[0] = rows;

    node = *dst;
    node.src[1] = &k;
    node.src[2] = &v;
    node.src[3] = &mask;
    for (int i = GGML_RQ_RECENT_K; i < GGML_MAX_SRC; ++i) {
        node.src[i] = nullptr;
    }
    ggml_set_op_params_i32(&node, 4, 0); // n_kv_max of upstream's, which counts those that the cache alone shows
}

// the same of one of both: the cache, rows that were held and those of this batch
static void ggml_cuda_rq_gather_rows(ggml_backend_cuda_context & ctx, const ggml_tensor * cells, const ggml_tensor * held, const ggml_tensor * fresh, const ggml_tensor & to) {
    const int64_t D = cells->ne[0], n_kv = cells->ne[1], heads = cells->ne[2];
    const bool    is_f16 = cells->type == GGML_TYPE_F16;

    if (!is_f16) {
        const size_t ts      = ggml_type_size(cells->type);
        const auto   convert = ggml_get_to_fp16_nc_cuda(cells->type);
        const bool   joined  = cells->nb[2] == ggml_row_size(cells->type, D); // heads are side by side
        for (int64_t i = 0; i < cells->ne[3]; ++i) {
            const void * x = (const char *) cells->data + i*cells->nb[3];
            half       * y = (half *) ((char *) to.data + i*to.nb[3]);
            if (joined) {
                convert(x, y, D*heads, n_kv, 1, 1, cells->nb[1]/ts, 0, 0, ctx.stream());
            } else {
                convert(x, y, D, heads, n_kv, 1, cells->nb[2]/ts, cells->nb[1]/ts, 0, ctx.stream());
            }
        }
    }

    ggml_cuda_rq_gather a = {};
    a.dst   = (half *) to.data;
    a.first = is_f16 ? 0 : n_kv;
    a.rows  = to.ne[1];
    a.D     = D;
    int end = 0;
    for (const ggml_tensor * t : { cells, held, fresh }) {
        const int s = t == cells ? 0 : t == held ? 1 : 2;
        end += t->ne[1];
        a.src[s] = (const char *) t->data;
        a.end[s] = end;
        for (int j = 0; j < 3; ++j) {
            a.nb[s][j] = t->nb[j + 1];
        }
    }
    a.heads   = init_fastdiv_values(heads);
    a.written = init_fastdiv_values(a.rows - a.first);
    const int64_t n = (a.rows - a.first)*heads*cells->ne[3];
    ggml_cuda_kernel_launch(ggml_cuda_rq_gather_kernel, ggml_cuda_rq_launch_params(n, ctx.stream()), a, n);
}

// whether rows of two values at a time can be taken from t
static bool ggml_cuda_rq_in_pairs(const ggml_tensor * t) {
    const size_t pair = 2*ggml_type_size(t->type);
    return t->ne[0] % 2 == 0 && t->nb[0] == pair/2 && t->nb[1] % pair == 0 && t->nb[2] % pair == 0 && t->nb[3] % pair == 0 && t->view_offs % pair == 0;
}

bool ggml_cuda_rq_supports_recent(const int device, const ggml_tensor * dst) {
    const ggml_tensor * k = dst->src[1];

    for (const ggml_tensor * t : { k, (const ggml_tensor *) dst->src[2] }) {
        if (t->type == GGML_TYPE_F16 ? !ggml_cuda_rq_in_pairs(t) : !ggml_get_to_fp16_nc_cuda(t->type) || t->nb[0] != ggml_type_size(t->type)) {
            return false;
        }
    }
    for (const int i : { GGML_RQ_RECENT_K, GGML_RQ_RECENT_V, GGML_RQ_RECENT_K_NEW, GGML_RQ_RECENT_V_NEW }) {
        if (!ggml_cuda_rq_in_pairs(dst->src[i])) {
            return false;
        }
    }
    if (ggml_get_op_params_f32(dst, 2) != 0.0f && k->ne[0] != 128 && k->ne[0] != 256 && k->ne[0] != 512) {
        return false; // upstream's kernels for other heads have no softcap, and do not say so
    }
    const int64_t n = dst->src[GGML_RQ_RECENT_K]->ne[1] + dst->src[GGML_RQ_RECENT_K_NEW]->ne[1];
    if (dst->src[0]->type != GGML_TYPE_F32 || ggml_rq_recent_width(dst) < k->ne[1] + n) {
        return false;
    }
    const ggml_cuda_rq_in_f16 f16(dst);
    return ggml_cuda_flash_attn_ext_supported(device, &f16.node);
}

size_t ggml_cuda_rq_recent_size(const ggml_tensor * dst) {
    return ggml_cuda_rq_in_f16(dst).size;
}

void ggml_cuda_rq_flash_attn_recent(ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    ggml_cuda_set_device(ctx.device);
    ggml_cuda_rq_in_f16 f16(dst);
    ggml_cuda_rq_gather_rows(ctx, dst->src[1], dst->src[GGML_RQ_RECENT_K], dst->src[GGML_RQ_RECENT_K_NEW], f16.k);
    if (f16.v.data != f16.k.data) {
        ggml_cuda_rq_gather_rows(ctx, dst->src[2], dst->src[GGML_RQ_RECENT_V], dst->src[GGML_RQ_RECENT_V_NEW], f16.v);
    }
    ggml_cuda_flash_attn_ext(ctx, &f16.node);
}

ggml_cuda_rq_recent ggml_cuda_rq_make_recent(const ggml_tensor * dst) {
    ggml_cuda_rq_recent res = {};
    if (!ggml_rq_has_recent(dst)) {
        return res;
    }
    const ggml_tensor * k     = dst->src[GGML_RQ_RECENT_K];
    const ggml_tensor * v     = dst->src[GGML_RQ_RECENT_V];
    const ggml_tensor * k_new = dst->src[GGML_RQ_RECENT_K_NEW];
    const ggml_tensor * v_new = dst->src[GGML_RQ_RECENT_V_NEW];
    const ggml_tensor * mask  = dst->src[GGML_RQ_RECENT_MASK];
    res.k        = (const char *) k->data;
    res.v        = (const char *) v->data;
    res.k_new    = (const char *) k_new->data;
    res.v_new    = (const char *) v_new->data;
    res.mask     = (const char *) mask->data;
    res.n_held   = k->ne[1];
    res.n        = k->ne[1] + k_new->ne[1];
    res.nb_mask  = mask->nb[1];
    res.nb_mask3 = mask->ne[3] == 1 ? 0 : mask->nb[3];
    for (int i = 0; i < 3; ++i) {
        res.nb_k[i]     = k->nb[i + 1];
        res.nb_v[i]     = v->nb[i + 1];
        res.nb_k_new[i] = k_new->nb[i + 1];
        res.nb_v_new[i] = v_new->nb[i + 1];
    }
    return res;
}

template <int D>
static void ggml_cuda_rq_fa_vec_launch(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, fattn_kernel_t kernel, const int cols) {
    const ggml_tensor * Q     = dst->src[0];
    const ggml_tensor * K     = dst->src[1];
    const ggml_tensor * V     = dst->src[2];
    const ggml_tensor * mask  = dst->src[3];
    const ggml_tensor * sinks = dst->src[4];
    constexpr int nthreads = 128; // as upstream's kernel is compiled

    const int64_t tiles_x = (Q->ne[1] + cols - 1)/cols;
    const int64_t tiles_z = Q->ne[2]*Q->ne[3];
    int per_sm = 0;
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, nthreads, 0));
    GGML_ASSERT(per_sm > 0);
    // a single part would leave no sum and maximum
    const int parts = std::max(2, ggml_cuda_rq_parts(tiles_x*tiles_z, (int64_t) per_sm*ggml_cuda_info().devices[ctx.device].nsm, (K->ne[1] + nthreads - 1)/nthreads));

    const int64_t rows = ggml_nrows(dst);
    ggml_cuda_pool_alloc<float>  part(ctx.pool(), rows*parts*D);
    ggml_cuda_pool_alloc<float2> meta(ctx.pool(), rows*parts);

    ggml_cuda_rq_queries queries = {};
    queries.q     = (const char *) Q->data;
    queries.nb[0] = Q->nb[1];
    queries.nb[1] = Q->nb[2];
    queries.nb[2] = Q->nb[3];
    queries.heads = init_fastdiv_values(Q->ne[2]);
    queries.n     = init_fastdiv_values(Q->ne[1]);
    queries.group = init_fastdiv_values(Q->ne[2]/K->ne[2]);
    memcpy(&queries.scale,    (const float *) dst->op_params + 0, sizeof(float));
    memcpy(&queries.max_bias, (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&queries.softcap,  (const float *) dst->op_params + 2, sizeof(float));
    if (queries.softcap != 0.0f) {
        queries.scale /= queries.softcap;
    }
    queries.n_head_log2 = 1u << (uint32_t) floorf(log2f((float) Q->ne[2])); // ALiBi, as everywhere in ggml
    queries.m0 = powf(2.0f, -queries.max_bias/queries.n_head_log2);
    queries.m1 = powf(2.0f, -queries.max_bias/2.0f/queries.n_head_log2);

    ggml_cuda_kernel_launch(kernel, ggml_cuda_kernel_launch_params(dim3(tiles_x, parts, tiles_z), dim3(WARP_SIZE, nthreads/WARP_SIZE, 1), 0, ctx.stream()),
        (const char *) Q->data, (const char *) K->data, (const char *) V->data, (const char *) mask->data,
        sinks ? (const char *) sinks->data : nullptr, (const int *) nullptr, part.ptr, meta.ptr,
        queries.scale, queries.max_bias, queries.m0, queries.m1, queries.n_head_log2, queries.softcap,
        Q->ne[0], init_fastdiv_values(Q->ne[1]), Q->ne[2], Q->ne[3], Q->nb[1], Q->nb[2], Q->nb[3],
        K->ne[0], K->ne[1], K->ne[2], K->ne[3], K->nb[1], K->nb[2], K->nb[3],
        V->nb[1], V->nb[2], V->nb[3],
        mask->ne[1], mask->ne[2], mask->ne[3], mask->nb[1], mask->nb[2], mask->nb[3]);
    ggml_cuda_kernel_launch(ggml_cuda_rq_combine_recent_kernel<D>, ggml_cuda_rq_launch_params(rows, ctx.stream()),
        (const float *) part.ptr, (const float2 *) meta.ptr, (float *) dst->data, rows, parts, queries, ggml_cuda_rq_make_recent(dst));
}

void ggml_cuda_rq_fa_vec_recent(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, fattn_kernel_t kernel, const int cols) {
    switch (dst->src[0]->ne[0]) {
        case  64: ggml_cuda_rq_fa_vec_launch< 64>(ctx, dst, kernel, cols); break;
        case 128: ggml_cuda_rq_fa_vec_launch<128>(ctx, dst, kernel, cols); break;
        case 256: ggml_cuda_rq_fa_vec_launch<256>(ctx, dst, kernel, cols); break;
        default:  GGML_ABORT("no vector kernel for heads of %d", (int) dst->src[0]->ne[0]);
    }
}
