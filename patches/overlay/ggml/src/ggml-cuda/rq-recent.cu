#include "rq.cuh"
#include "rq-kernels.cuh"

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
    v = place(dst->src[2]);

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
    ggml_cuda_rq_gather_rows(ctx, dst->src[2], dst->src[GGML_RQ_RECENT_V], dst->src[GGML_RQ_RECENT_V_NEW], f16.v);
    ggml_cuda_flash_attn_ext(ctx, &f16.node);
}
