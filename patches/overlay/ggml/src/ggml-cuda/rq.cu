#include "rq.cuh"
#include "rq-kernels.cuh"
#include "rq-fuse.h"
#include "rq-supports.h"

bool ggml_cuda_rq_is_type(const ggml_type type) {
    return ggml_rq_is_type(type);
}

ggml_cuda_kernel_launch_params ggml_cuda_rq_launch_params(const int64_t warps, cudaStream_t stream) {
    const int64_t blocks = (warps + GGML_CUDA_RQ_WARPS - 1)/GGML_CUDA_RQ_WARPS;
    GGML_ASSERT(warps <= INT_MAX/4); // units have indices of 31 bits, and a warp takes up to four
    return ggml_cuda_kernel_launch_params(dim3(blocks, 1, 1), dim3(WARP_SIZE, GGML_CUDA_RQ_WARPS, 1), 0, stream);
}

static ggml_cuda_rq_rows ggml_cuda_rq_make_rows(const int64_t (&ne)[3], const int64_t (&nb)[4]) {
    return { init_fastdiv_values(ne[0]), init_fastdiv_values(ne[1]), init_fastdiv_values(ne[2]), nb[0], nb[1], nb[2], nb[3] };
}

// in blocks of that type
static ggml_cuda_rq_rows ggml_cuda_rq_make_rows(const ggml_tensor * t, const ggml_type type) {
    const int64_t n = ggml_blck_size(type);
    return ggml_cuda_rq_make_rows({ t->ne[0]/n, t->ne[1], t->ne[2] },
        { (int64_t) ggml_row_size(t->type, n), (int64_t) t->nb[1], (int64_t) t->nb[2], (int64_t) t->nb[3] });
}

// calls f with the code of a type
template <int N, typename F>
static void ggml_cuda_rq_with_code_of(const int bits, const F & f) {
    switch (bits) {
        case 2:  f(ggml_cuda_rq_code<2, N>()); break;
        case 3:  f(ggml_cuda_rq_code<3, N>()); break;
        case 4:  f(ggml_cuda_rq_code<4, N>()); break;
        default: GGML_ABORT("no kernels for %d bits", bits);
    }
}

template <typename F>
static void ggml_cuda_rq_with_code(const ggml_type type, const F & f) {
    if (ggml_rq_is_sibling(type)) {
        ggml_cuda_rq_with_code_of<QK_RQ_64>(ggml_rq_type_bits(type), f);
    } else {
        ggml_cuda_rq_with_code_of<QK_RQ>(ggml_rq_type_bits(type), f);
    }
}

// warps for n blocks of that type, of which each takes so many lanes
static int64_t ggml_cuda_rq_warps_for(const int64_t n, const int lanes) {
    return (n*lanes + WARP_SIZE - 1)/WARP_SIZE;
}

static void ggml_cuda_rq_set_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * src = dst->src[0];
    const ggml_tensor * idx = dst->src[1];

    const int64_t n = ggml_nelements(src)/ggml_blck_size(dst->type);
    if (n == 0) {
        return;
    }
    ggml_cuda_rq_with_code(dst->type, [&](auto of) {
        typedef decltype(of) code;
        const auto params = ggml_cuda_rq_launch_params(ggml_cuda_rq_warps_for(n, code::values/4), ctx.stream());
        const auto launch = [&](auto kernel) {
            ggml_cuda_kernel_launch(kernel, params, (const char *) src->data, (const char *) idx->data, (char *) dst->data, n,
                ggml_cuda_rq_make_rows(src, dst->type), init_fastdiv_values(idx->ne[1]), init_fastdiv_values(idx->ne[2]), (int64_t) idx->nb[0], (int64_t) idx->nb[1], (int64_t) idx->nb[2],
                (int64_t) dst->nb[1], (int64_t) dst->nb[2], (int64_t) dst->nb[3], (int) ggml_rq_scale_kind());
        };
        if (idx->type == GGML_TYPE_I64) {
            launch(ggml_cuda_rq_set_rows_kernel<code, int64_t>);
        } else {
            launch(ggml_cuda_rq_set_rows_kernel<code, int32_t>);
        }
    });
}

static void ggml_cuda_rq_get_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * src = dst->src[0];
    const ggml_tensor * idx = dst->src[1];

    const int64_t n = ggml_nelements(dst)/ggml_blck_size(src->type);
    if (n == 0) {
        return;
    }
    ggml_cuda_rq_with_code(src->type, [&](auto of) {
        typedef decltype(of) code;
        ggml_cuda_kernel_launch(ggml_cuda_rq_get_rows_kernel<code>, ggml_cuda_rq_launch_params(ggml_cuda_rq_warps_for(n, code::values/8), ctx.stream()),
            (const char *) src->data, (const char *) idx->data, (char *) dst->data, n, ggml_cuda_rq_make_rows(dst, src->type),
            (int64_t) idx->nb[0], (int64_t) idx->nb[1], (int64_t) idx->nb[2],
            (int64_t) src->nb[1], (int64_t) src->nb[2], (int64_t) src->nb[3]);
    });
}

static void ggml_cuda_rq_cpy(ggml_backend_cuda_context & ctx, const ggml_tensor * src, ggml_tensor * dst) {
    const ggml_type type = ggml_rq_is_type(src->type) ? src->type : dst->type;

    const int64_t n = ggml_nelements(src)/ggml_blck_size(type);
    if (n == 0) {
        return;
    }
    const auto s = ggml_cuda_rq_make_rows(src, type);
    const auto d = ggml_cuda_rq_make_rows(dst, type);

    ggml_cuda_rq_with_code(type, [&](auto of) {
        typedef decltype(of) code;
        if (!ggml_rq_is_type(src->type)) {
            ggml_cuda_kernel_launch(ggml_cuda_rq_quantize_kernel<code>, ggml_cuda_rq_launch_params(ggml_cuda_rq_warps_for(n, code::values/4), ctx.stream()),
                (const char *) src->data, (char *) dst->data, n, s, d, (int) ggml_rq_scale_kind());
        } else if (dst->type == GGML_TYPE_F32) {
            ggml_cuda_kernel_launch(ggml_cuda_rq_dequantize_kernel<code, float>, ggml_cuda_rq_launch_params(ggml_cuda_rq_warps_for(n, code::values/8), ctx.stream()),
                (const char *) src->data, (char *) dst->data, n, s, d);
        } else {
            ggml_cuda_kernel_launch(ggml_cuda_rq_copy_kernel<code>, ggml_cuda_rq_launch_params(n, ctx.stream()),
                (const char *) src->data, (char *) dst->data, n, s, d);
        }
    });
}

template <typename code>
static void ggml_cuda_rq_dequantize_f16_nc(const void * x, half * y, const int64_t ne00, const int64_t ne01, const int64_t ne02, const int64_t ne03,
        const int64_t s01, const int64_t s02, const int64_t s03, cudaStream_t stream) {
    const int64_t ts = sizeof(typename code::block);
    const int64_t ds = code::values*sizeof(half);
    const int64_t nb = ne00/code::values;
    const int64_t n  = nb*ne01*ne02*ne03;
    if (n == 0) {
        return;
    }
    ggml_cuda_kernel_launch(ggml_cuda_rq_dequantize_kernel<code, half>, ggml_cuda_rq_launch_params(ggml_cuda_rq_warps_for(n, code::values/8), stream),
        (const char *) x, (char *) y, n,
        ggml_cuda_rq_make_rows({ nb, ne01, ne02 }, { ts, s01*ts, s02*ts, s03*ts }),
        ggml_cuda_rq_make_rows({ nb, ne01, ne02 }, { ds, nb*ds, ne01*nb*ds, ne02*ne01*nb*ds }));
}

template <typename code>
static void ggml_cuda_rq_dequantize_f16(const void * x, half * y, const int64_t k, cudaStream_t stream) {
    const int64_t n = k/code::values;
    ggml_cuda_rq_dequantize_f16_nc<code>(x, y, k, 1, 1, 1, n, n, n, stream);
}

to_fp16_cuda_t ggml_cuda_rq_to_fp16(const ggml_type type) {
    to_fp16_cuda_t res = nullptr;
    if (ggml_rq_is_type(type) && !ggml_rq_has_5_bits(type)) {
        ggml_cuda_rq_with_code(type, [&](auto of) { res = ggml_cuda_rq_dequantize_f16<decltype(of)>; });
    }
    return res;
}

to_fp16_nc_cuda_t ggml_cuda_rq_to_fp16_nc(const ggml_type type) {
    to_fp16_nc_cuda_t res = nullptr;
    if (ggml_rq_is_type(type) && !ggml_rq_has_5_bits(type)) {
        ggml_cuda_rq_with_code(type, [&](auto of) { res = ggml_cuda_rq_dequantize_f16_nc<decltype(of)>; });
    }
    return res;
}

// where the rows of a job are stored
static void ggml_cuda_rq_set_store(ggml_cuda_rq_job & job, const ggml_tensor * store) {
    job.cache    = (char *) store->data;
    job.nb_cache = store->nb[1];
    job.idx      = (const char *) store->src[1]->data;
    job.nb_idx   = store->src[1]->nb[0];
    job.wide     = store->src[1]->type == GGML_TYPE_I64;
    job.block    = ggml_rq_type_block(store->type);
    job.units    = init_fastdiv_values(store->ne[0]/job.block);
    job.bits     = ggml_rq_type_bits(store->type);
    GGML_ASSERT(job.bits >= 2 && job.bits <= 4);
}

static ggml_cuda_rq_job ggml_cuda_rq_make_job(const ggml_cuda_rq_rotation & rotation) {
    const ggml_tensor * rot  = rotation.rot;
    const int32_t       hint = ggml_get_op_params_i32(rot, 1);

    ggml_cuda_rq_job job = {};
    job.src    = (const float *) rot->src[1]->data;
    job.dst    = rotation.keep ? (float *) rot->data : nullptr;
    job.rows   = ggml_nrows(rot);
    job.family = ggml_rq_hint_family(hint);
    job.mode   = ggml_rq_hint_mode(hint);
    if (rotation.store) {
        ggml_cuda_rq_set_store(job, rotation.store);
    }
    return job;
}

static ggml_cuda_rq_map ggml_cuda_rq_make_map(const ggml_cuda_rq_rotation & product) {
    const ggml_tensor * mul    = product.rot;
    const ggml_tensor * map    = mul->src[0];
    const ggml_tensor * src    = product.sub ? product.sub->src[0] : mul->src[1];
    const int64_t       n      = map->ne[0];
    const int64_t       tokens = mul->ne[1];
    const int64_t       group  = mul->ne[2];
    const int64_t       heads  = mul->ne[3];
    const int64_t       rows   = tokens*group;

    ggml_cuda_rq_map res = {};
    res.map  = (const char *) map->data;
    res.mean = product.sub ? (const float *) product.sub->src[1]->data : nullptr;
    res.src  = (const float *) src->data;
    res.dst  = product.keep ? (float *) ggml_cuda_rq_result(product)->data : nullptr;
    // before the mean is off they are [n, heads, tokens], behind it [n, tokens, group, heads]
    const int order[3] = { product.sub ? 2 : 1, product.sub ? 3 : 2, product.sub ? 1 : 3 };
    for (int i = 0; i < 3; ++i) {
        res.nb_src[i] = src->nb[order[i]]/sizeof(float);
    }
    res.nb_dst[0] = product.cont ? n*heads : n;
    res.nb_dst[1] = n*tokens;
    res.nb_dst[2] = product.cont ? n : n*rows;
    if (product.store) {
        ggml_cuda_rq_set_store(res.store, product.store);
    }
    res.group  = init_fastdiv_values(group);
    res.tiles  = init_fastdiv_values((rows + GGML_CUDA_RQ_MAP_ROWS - 1)/GGML_CUDA_RQ_MAP_ROWS);
    res.rows   = rows;
    res.heads  = heads;
    res.n      = n;
    res.is_f16 = map->type == GGML_TYPE_F16;
    return res;
}

// calls f with how many values are rotated together
template <typename F>
static void ggml_cuda_rq_with_width(const int64_t n, const F & f) {
    switch (n) {
        case 2*QK_RQ:  f(std::integral_constant<int, 2*QK_RQ>());  break;
        case QK_RQ:    f(std::integral_constant<int, QK_RQ>());    break;
        case QK_RQ_64: f(std::integral_constant<int, QK_RQ_64>()); break;
        default: GGML_ABORT("no kernel rotates %d values together", (int) n);
    }
}

static void ggml_cuda_rq_rotate(ggml_backend_cuda_context & ctx, const ggml_cuda_rq_rotation * rotations, const int n) {
    static_assert(GGML_CUDA_RQ_MAX_ROTATIONS <= GGML_CUDA_RQ_MAX_JOBS, "a launch takes all that are fused");
    ggml_cuda_rq_jobs jobs = {};
    ggml_cuda_rq_maps maps = {};
    int64_t width     = QK_RQ;
    int64_t blocks    = 0; // CUDA blocks
    int     nb_shared = 0;
    for (int i = 0; i < n; ++i) {
        if (rotations[i].map) {
            const ggml_cuda_rq_map map = maps.map[maps.n++] = ggml_cuda_rq_make_map(rotations[i]);
            blocks   += (int64_t) map.tiles.z*map.heads;
            nb_shared = std::max(nb_shared, ggml_cuda_rq_map_nb_shared(map.n));
        } else {
            width = rotations[i].rot->ne[0];
            jobs.job[jobs.n++] = ggml_cuda_rq_make_job(rotations[i]);
        }
    }
    int64_t warps = 0;
    for (int i = 0; i < jobs.n; ++i) {
        warps += ggml_cuda_rq_warps_for(jobs.job[i].rows, ggml_cuda_rq_lanes(width));
    }
    if (blocks + warps == 0) {
        return;
    }
    jobs.scale_kind = (int) ggml_rq_scale_kind();
    ggml_cuda_rq_with_width(width, [&](auto of) {
        auto params = ggml_cuda_rq_launch_params(warps, ctx.stream());
        if (maps.n == 0) {
            ggml_cuda_kernel_launch(ggml_cuda_rq_rotate_kernel<of.value>, params, jobs);
            return;
        }
        const dim3 grid(params.block_nums.x + blocks, 1, 1);
        ggml_cuda_kernel_launch(ggml_cuda_rq_turn_kernel<of.value>,
            ggml_cuda_kernel_launch_params(grid, dim3(WARP_SIZE, GGML_CUDA_RQ_WARPS, 1), nb_shared, ctx.stream()), maps, jobs);
    });
}

int ggml_cuda_rq_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, const int i) {
    if (ctx.curr_stream_no != 0) { // GGML_CUDA_GRAPH_OPT: Q, K and V each on a stream
        return 0;
    }
    if (graph->nodes[i]->op == GGML_OP_FLASH_ATTN_EXT) {
        return ggml_cuda_rq_flash_attn_rotated(ctx, graph, i);
    }
    if (!ggml_cuda_rq_begins(graph, i)) {
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
            const ggml_cuda_rq_rotation rotation = { dst, nullptr, true, false, nullptr, nullptr };
            ggml_cuda_rq_rotate(ctx, &rotation, 1);
            return true;
        }
        case GGML_OP_FLASH_ATTN_EXT:
            if (ggml_cuda_rq_use_flash_attn(ctx.device, dst)) {
                ggml_cuda_rq_flash_attn(ctx, dst);
                return true;
            }
            ggml_cuda_rq_warn_flash_attn(ctx.device, dst);
            if (!ggml_rq_has_recent(dst)) {
                return false;
            }
            ggml_cuda_rq_flash_attn_recent(ctx, dst);
            return true;
        default:
            return false;
    }
}

bool ggml_cuda_rq_decides(const int device, const ggml_tensor * op, bool & supported) {
    if (ggml_cuda_rq_decides_node(op, supported)) {
        return true;
    }
    if (ggml_rq_has_recent(op)) {
        supported = ggml_cuda_rq_supports_recent(device, op);
        return true;
    }
    return false;
}
