#include "rq.cuh"
#include "rq-kernels.cuh"
#include "rq-fuse.h"

bool ggml_cuda_rq_is_type(const ggml_type type) {
    return ggml_rq_is_type(type);
}

ggml_cuda_kernel_launch_params ggml_cuda_rq_launch_params(const int64_t warps, cudaStream_t stream) {
    const int64_t blocks = (warps + GGML_CUDA_RQ_WARPS - 1)/GGML_CUDA_RQ_WARPS;
    GGML_ASSERT(warps <= INT_MAX/2); // units have indices of 31 bits, and a warp takes up to two
    return ggml_cuda_kernel_launch_params(dim3(blocks, 1, 1), dim3(WARP_SIZE, GGML_CUDA_RQ_WARPS, 1), 0, stream);
}

// values of 128 lie together in t
static bool ggml_cuda_rq_in_units(const ggml_tensor * t) {
    return t->ne[0] % QK_RQ == 0 && t->nb[0] == ggml_type_size(t->type);
}

static ggml_cuda_rq_rows ggml_cuda_rq_make_rows(const int64_t (&ne)[3], const int64_t (&nb)[4]) {
    return { init_fastdiv_values(ne[0]), init_fastdiv_values(ne[1]), init_fastdiv_values(ne[2]), nb[0], nb[1], nb[2], nb[3] };
}

static ggml_cuda_rq_rows ggml_cuda_rq_make_rows(const ggml_tensor * t) {
    return ggml_cuda_rq_make_rows({ t->ne[0]/QK_RQ, t->ne[1], t->ne[2] },
        { (int64_t) ggml_row_size(t->type, QK_RQ), (int64_t) t->nb[1], (int64_t) t->nb[2], (int64_t) t->nb[3] });
}

// calls f with the number of bits as a constant
template <typename F>
static void ggml_cuda_rq_with_bits(const ggml_type type, const F & f) {
    switch (ggml_rq_type_bits(type)) {
        case 2:  f(std::integral_constant<int, 2>()); break;
        case 3:  f(std::integral_constant<int, 3>()); break;
        default: f(std::integral_constant<int, 4>()); break;
    }
}

static void ggml_cuda_rq_set_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * src = dst->src[0];
    const ggml_tensor * idx = dst->src[1];

    const int64_t n = ggml_nelements(src)/QK_RQ;
    if (n == 0) {
        return;
    }
    const auto params = ggml_cuda_rq_launch_params(n, ctx.stream());

    ggml_cuda_rq_with_bits(dst->type, [&](auto bits) {
        const auto launch = [&](auto kernel) {
            ggml_cuda_kernel_launch(kernel, params, (const char *) src->data, (const char *) idx->data, (char *) dst->data, n,
                ggml_cuda_rq_make_rows(src), init_fastdiv_values(idx->ne[1]), init_fastdiv_values(idx->ne[2]), (int64_t) idx->nb[0], (int64_t) idx->nb[1], (int64_t) idx->nb[2],
                (int64_t) dst->nb[1], (int64_t) dst->nb[2], (int64_t) dst->nb[3], (int) ggml_rq_scale_kind());
        };
        if (idx->type == GGML_TYPE_I64) {
            launch(ggml_cuda_rq_set_rows_kernel<bits.value, int64_t>);
        } else {
            launch(ggml_cuda_rq_set_rows_kernel<bits.value, int32_t>);
        }
    });
}

static void ggml_cuda_rq_get_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * src = dst->src[0];
    const ggml_tensor * idx = dst->src[1];

    const int64_t n = ggml_nelements(dst)/QK_RQ;
    if (n == 0) {
        return;
    }
    ggml_cuda_rq_with_bits(src->type, [&](auto bits) {
        ggml_cuda_kernel_launch(ggml_cuda_rq_get_rows_kernel<bits.value>, ggml_cuda_rq_launch_params((n + 1)/2, ctx.stream()),
            (const char *) src->data, (const char *) idx->data, (char *) dst->data, n, ggml_cuda_rq_make_rows(dst),
            (int64_t) idx->nb[0], (int64_t) idx->nb[1], (int64_t) idx->nb[2],
            (int64_t) src->nb[1], (int64_t) src->nb[2], (int64_t) src->nb[3]);
    });
}

static void ggml_cuda_rq_cpy(ggml_backend_cuda_context & ctx, const ggml_tensor * src, ggml_tensor * dst) {
    const int64_t n = ggml_nelements(src)/QK_RQ;
    if (n == 0) {
        return;
    }
    const auto s = ggml_cuda_rq_make_rows(src);
    const auto d = ggml_cuda_rq_make_rows(dst);

    if (!ggml_rq_is_type(src->type)) {
        ggml_cuda_rq_with_bits(dst->type, [&](auto bits) {
            ggml_cuda_kernel_launch(ggml_cuda_rq_quantize_kernel<bits.value>, ggml_cuda_rq_launch_params(n, ctx.stream()),
                (const char *) src->data, (char *) dst->data, n, s, d, (int) ggml_rq_scale_kind());
        });
    } else if (dst->type == GGML_TYPE_F32) {
        ggml_cuda_rq_with_bits(src->type, [&](auto bits) {
            ggml_cuda_kernel_launch(ggml_cuda_rq_dequantize_kernel<bits.value, float>, ggml_cuda_rq_launch_params((n + 1)/2, ctx.stream()),
                (const char *) src->data, (char *) dst->data, n, s, d);
        });
    } else {
        ggml_cuda_rq_with_bits(src->type, [&](auto bits) {
            ggml_cuda_kernel_launch(ggml_cuda_rq_copy_kernel<bits.value>, ggml_cuda_rq_launch_params(n, ctx.stream()),
                (const char *) src->data, (char *) dst->data, n, s, d);
        });
    }
}

template <int bits>
static void ggml_cuda_rq_dequantize_f16_nc(const void * x, half * y, const int64_t ne00, const int64_t ne01, const int64_t ne02, const int64_t ne03,
        const int64_t s01, const int64_t s02, const int64_t s03, cudaStream_t stream) {
    const int64_t ts = sizeof(typename ggml_cuda_rq_code<bits>::block);
    const int64_t ds = QK_RQ*sizeof(half);
    const int64_t nb = ne00/QK_RQ;
    const int64_t n  = nb*ne01*ne02*ne03;
    if (n == 0) {
        return;
    }
    ggml_cuda_kernel_launch(ggml_cuda_rq_dequantize_kernel<bits, half>, ggml_cuda_rq_launch_params((n + 1)/2, stream),
        (const char *) x, (char *) y, n,
        ggml_cuda_rq_make_rows({ nb, ne01, ne02 }, { ts, s01*ts, s02*ts, s03*ts }),
        ggml_cuda_rq_make_rows({ nb, ne01, ne02 }, { ds, nb*ds, ne01*nb*ds, ne02*ne01*nb*ds }));
}

template <int bits>
static void ggml_cuda_rq_dequantize_f16(const void * x, half * y, const int64_t k, cudaStream_t stream) {
    ggml_cuda_rq_dequantize_f16_nc<bits>(x, y, k, 1, 1, 1, k/QK_RQ, k/QK_RQ, k/QK_RQ, stream);
}

to_fp16_cuda_t ggml_cuda_rq_to_fp16(const ggml_type type) {
    if (!ggml_rq_is_type(type) || ggml_rq_is_for_cpu(type)) {
        return nullptr;
    }
    const to_fp16_cuda_t f[] = { ggml_cuda_rq_dequantize_f16<2>, ggml_cuda_rq_dequantize_f16<3>, ggml_cuda_rq_dequantize_f16<4> };
    return f[ggml_rq_type_bits(type) - 2];
}

to_fp16_nc_cuda_t ggml_cuda_rq_to_fp16_nc(const ggml_type type) {
    if (!ggml_rq_is_type(type) || ggml_rq_is_for_cpu(type)) {
        return nullptr;
    }
    const to_fp16_nc_cuda_t f[] = { ggml_cuda_rq_dequantize_f16_nc<2>, ggml_cuda_rq_dequantize_f16_nc<3>, ggml_cuda_rq_dequantize_f16_nc<4> };
    return f[ggml_rq_type_bits(type) - 2];
}

static void ggml_cuda_rq_rotate(ggml_backend_cuda_context & ctx, const ggml_cuda_rq_rotation * rotations, const int n) {
    static_assert(GGML_CUDA_RQ_MAX_ROTATIONS <= GGML_CUDA_RQ_MAX_JOBS, "a launch takes all that are fused");
    ggml_cuda_rq_jobs jobs = {};
    int64_t rows = 0;
    for (int i = 0; i < n; ++i) {
        const ggml_tensor * rot   = rotations[i].rot;
        const ggml_tensor * store = rotations[i].store;
        const int32_t       hint  = ggml_get_op_params_i32(rot, 1);

        ggml_cuda_rq_job & job = jobs.job[i];
        job.src    = (const float *) rot->src[1]->data;
        job.dst    = rotations[i].keep ? (float *) rot->data : nullptr;
        job.rows   = ggml_nrows(rot);
        job.family = ggml_rq_hint_family(hint);
        job.mode   = ggml_rq_hint_mode(hint);
        if (store) {
            job.cache    = (char *) store->data;
            job.nb_cache = store->nb[1];
            job.idx      = (const char *) store->src[1]->data;
            job.nb_idx   = store->src[1]->nb[0];
            job.wide     = store->src[1]->type == GGML_TYPE_I64;
            job.units    = init_fastdiv_values(store->ne[0]/QK_RQ);
            job.bits     = ggml_rq_type_bits(store->type);
        }
        rows += job.rows;
    }
    if (rows == 0) {
        return;
    }
    jobs.n          = n;
    jobs.scale_kind = (int) ggml_rq_scale_kind();
    const bool wide_rows = rotations[0].rot->ne[0] == 2*QK_RQ;
    ggml_cuda_kernel_launch(wide_rows ? ggml_cuda_rq_rotate_kernel<2*QK_RQ> : ggml_cuda_rq_rotate_kernel<QK_RQ>,
        ggml_cuda_rq_launch_params(rows, ctx.stream()), jobs);
}

int ggml_cuda_rq_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i) {
    if (ctx.curr_stream_no != 0) { // GGML_CUDA_GRAPH_OPT: Q, K and V each on a stream
        return 0;
    }
    if (graph->nodes[i]->op == GGML_OP_FLASH_ATTN_EXT) {
        return ggml_cuda_rq_flash_attn_rotated(ctx, graph, i);
    }
    if (!ggml_cuda_rq_is_rotation(graph->nodes[i])) {
        return 0;
    }
    const ggml_cuda_rq_fusion fusion = ggml_cuda_rq_fuse(graph, i);
    if (fusion.n_nodes == 0) {
        return 0;
    }
    ggml_cuda_rq_rotate(ctx, fusion.rotations, fusion.n);
    return fusion.n_nodes - 1;
}

bool ggml_cuda_rq_compute_forward(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * src = dst->src[0];

    switch (dst->op) {
        case GGML_OP_SET_ROWS:
            if (!ggml_rq_is_type(dst->type)) {
                return false;
            }
            ggml_cuda_rq_set_rows(ctx, dst);
            return true;
        case GGML_OP_GET_ROWS:
            if (!ggml_rq_is_type(src->type)) {
                return false;
            }
            ggml_cuda_rq_get_rows(ctx, dst);
            return true;
        case GGML_OP_CPY:
        case GGML_OP_CONT:
        case GGML_OP_DUP:
            if (!ggml_rq_is_type(src->type) && !ggml_rq_is_type(dst->type)) {
                return false;
            }
            ggml_cuda_rq_cpy(ctx, src, dst);
            return true;
        case GGML_OP_MUL_MAT: {
            if (!ggml_cuda_rq_is_rotation(dst)) {
                return false;
            }
            const ggml_cuda_rq_rotation rotation = { dst, nullptr, true };
            ggml_cuda_rq_rotate(ctx, &rotation, 1);
            return true;
        }
        case GGML_OP_FLASH_ATTN_EXT:
            if (ggml_cuda_rq_use_flash_attn(ctx.device, dst)) {
                ggml_cuda_rq_flash_attn(ctx, dst);
                return true;
            }
            ggml_cuda_rq_warn_flash_attn(dst);
            if (!ggml_rq_has_recent(dst)) {
                return false;
            }
            ggml_cuda_rq_flash_attn_recent(ctx, dst);
            return true;
        default:
            return false;
    }
}

// K and V that our attention kernel is compiled for together with a type of ours
static bool ggml_cuda_rq_pairs_with(const ggml_type type) {
    return ggml_rq_is_type(type) || type == GGML_TYPE_F16 || type == GGML_TYPE_Q8_0;
}

// there are no kernels for blocks of 64 values yet
static bool ggml_cuda_rq_has_sibling(const ggml_tensor * op) {
    bool res = ggml_rq_is_sibling(op->type);
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        res = res || (op->src[i] && ggml_rq_is_sibling(op->src[i]->type));
    }
    return res;
}

bool ggml_cuda_rq_decides(const int device, const ggml_tensor * op, bool & supported) {
    const ggml_tensor * a = op->src[0];
    const ggml_tensor * b = op->src[1];

    if (ggml_cuda_rq_has_sibling(op) || ggml_rq_op_is_for_cpu(op)) {
        supported = ggml_op_is_empty(op->op);
        return true;
    }

    switch (op->op) {
        case GGML_OP_SET_ROWS:
            if (!ggml_rq_is_type(op->type)) {
                return false;
            }
            supported = a->type == GGML_TYPE_F32 && (b->type == GGML_TYPE_I64 || b->type == GGML_TYPE_I32) && ggml_cuda_rq_in_units(a);
            return true;
        case GGML_OP_GET_ROWS:
            if (!ggml_rq_is_type(a->type)) {
                return false;
            }
            supported = op->type == GGML_TYPE_F32 && b->type == GGML_TYPE_I32 && ggml_cuda_rq_in_units(a) && ggml_cuda_rq_in_units(op);
            return true;
        case GGML_OP_CPY:
        case GGML_OP_CONT:
        case GGML_OP_DUP:
            if (!ggml_rq_is_type(a->type) && !ggml_rq_is_type(op->type)) {
                return false;
            }
            supported = ggml_cuda_rq_in_units(a) && ggml_cuda_rq_in_units(op) &&
                (a->type == op->type || a->type == GGML_TYPE_F32 || op->type == GGML_TYPE_F32);
            return true;
        case GGML_OP_FLASH_ATTN_EXT:
            if ((ggml_rq_is_type(b->type) || ggml_rq_is_type(op->src[2]->type)) &&
                    !(ggml_cuda_rq_pairs_with(b->type) && ggml_cuda_rq_pairs_with(op->src[2]->type))) {
                supported = false;
                return true;
            }
            if (ggml_rq_has_recent(op)) {
                supported = ggml_cuda_rq_supports_recent(device, op);
                return true;
            }
            return false; // shapes are as upstream's kernels have them
        default:
            return false;
    }
}
