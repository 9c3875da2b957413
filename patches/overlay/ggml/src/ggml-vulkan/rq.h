#pragma once

// The rotated cache types on Vulkan: what upstream's host code asks of them. The shaders are vulkan-shaders/rq*.

#include "ggml-vulkan-common.h"
#include "ggml-rq-types.h"

#include <initializer_list>

struct ggml_vk_rq_rotate_push_constants {
    uint32_t n_rows, src_offset, dst_offset, full;
};

// strides in elements
struct ggml_vk_rq_recent_push_constants {
    uint32_t n_split, n_held, n_new, group;
    uint32_t nb_q[3], nb_k[3], nb_v[3], nb_k_new[3], nb_v_new[3]; // of rows, heads and streams
    uint32_t nb_mask, nb_mask3, first; // the column of the first row
    uint32_t offsets;                  // of k, v, k_new and v_new, a byte each
    uint32_t n_head_log2_sinks;
    uint32_t head_k, head_v;
    float    scale, softcap, m0, m1;
};
static_assert(sizeof(ggml_vk_rq_recent_push_constants) <= 128, "more than any device takes");

// Pipelines by type, as upstream keeps its own; types of one code share them. create is upstream's way to make one, which
// does no more than name it until it is needed.
template <typename F>
static void ggml_vk_rq_pipelines(vk_device & device, const F & create) {
    std::map<std::pair<uint32_t, uint32_t>, ggml_type> made; // by bits and values of a block

    for (const ggml_type type : { GGML_RQ_TYPE_LIST, GGML_RQ_SIBLING_LIST }) {
        const uint32_t bits = ggml_rq_type_bits(type);
        const uint32_t n    = ggml_rq_type_block(type);

        const ggml_type same = made.emplace(std::make_pair(bits, n), type).first->second;
        if (same != type) {
            device->pipeline_set_rows_i32[0][type]       = device->pipeline_set_rows_i32[0][same];
            device->pipeline_set_rows_i64[0][type]       = device->pipeline_set_rows_i64[0][same];
            device->pipeline_cpy_f32_quant[type]         = device->pipeline_cpy_f32_quant[same];
            device->pipeline_cpy_quant_f32[type]         = device->pipeline_cpy_quant_f32[same];
            device->pipeline_rq_cpy_f16[type]            = device->pipeline_rq_cpy_f16[same];
            device->pipeline_get_rows_f32[type]          = device->pipeline_get_rows_f32[same];
            device->pipeline_dequant_transpose[type]     = device->pipeline_dequant_transpose[same];
            continue;
        }

        // the encoder: 32 blocks in a workgroup, a thread for 16 values
        const std::vector<uint32_t> to = { 1, 32*n/16, bits, n };

        create(device, device->pipeline_set_rows_i32[0][type], "rq_set_rows_i32", rq_set_rows_i32_len, rq_set_rows_i32_data, "main", 3,
            sizeof(vk_op_binary_push_constants), {  1, 1, 1 }, to, 1);
        create(device, device->pipeline_set_rows_i64[0][type], "rq_set_rows_i64", rq_set_rows_i64_len, rq_set_rows_i64_data, "main", 3,
            sizeof(vk_op_binary_push_constants), {  1, 1, 1 }, to, 1);
        create(device, device->pipeline_cpy_f32_quant[type], "rq_cpy_to", rq_cpy_to_len, rq_cpy_to_data, "main", 2,
            sizeof(vk_op_unary_push_constants),  { 32, 1, 1 }, to, 1);
        create(device, device->pipeline_cpy_quant_f32[type], "rq_cpy_from", rq_cpy_from_len, rq_cpy_from_data, "main", 2,
            sizeof(vk_op_unary_push_constants),  {  n, 1, 1 }, { n/4, bits, n }, 1);
        create(device, device->pipeline_rq_cpy_f16[type], "rq_cpy_from_f16", rq_cpy_from_f16_len, rq_cpy_from_f16_data, "main", 2,
            sizeof(vk_op_unary_push_constants),  {  n, 1, 1 }, { n/4, bits, n }, 1);
        create(device, device->pipeline_get_rows_f32[type], "rq_get_rows", rq_get_rows_len, rq_get_rows_data, "main", 3,
            sizeof(vk_op_binary_push_constants), { 128, 1, 1 }, { 1, bits, n }, 1);
        create(device, device->pipeline_dequant_transpose[type], "rq_dequant_transpose", rq_dequant_transpose_len, rq_dequant_transpose_data, "main", 2,
            5*sizeof(uint32_t), { 4096, 1, 1 }, { 0, bits, n }, 1);
    }

    // upstream's types of 32 values to f16, for attention over recent rows beside them
#define RQ_CPY_F16(TYPE, name) \
    create(device, device->pipeline_rq_cpy_f16[GGML_TYPE_##TYPE], "rq_cpy_" #name "_f16", rq_cpy_##name##_f16_len, rq_cpy_##name##_f16_data, "main", 2, \
        sizeof(vk_op_unary_push_constants), { 32, 1, 1 }, {}, 1);
    RQ_CPY_F16(Q4_0, q4_0) RQ_CPY_F16(Q4_1, q4_1) RQ_CPY_F16(Q5_0, q5_0) RQ_CPY_F16(Q5_1, q5_1) RQ_CPY_F16(Q8_0, q8_0) RQ_CPY_F16(IQ4_NL, iq4_nl)
#undef RQ_CPY_F16

    for (uint32_t family = 0; family < 3; family++) {
        for (uint32_t i = 0; i < 3; i++) {
            create(device, device->pipeline_rq_rotate[family][i], "rq_rotate", rq_rotate_len, rq_rotate_data, "main", 2,
                sizeof(ggml_vk_rq_rotate_push_constants), { 256/(64u << i), 1, 1 }, { family, 64u << i }, 1);
        }
    }
    create(device, device->pipeline_rq_recent, "rq_recent", rq_recent_len, rq_recent_data, "main", 9,
        sizeof(ggml_vk_rq_recent_push_constants), { 1, 1, 1 }, {}, 1);
}

// the pipeline of a copy from f32 into one of our types or from it to f32, and of one to f16; null for other copies
static inline vk_pipeline ggml_vk_rq_cpy_pipeline(const vk_device & device, ggml_type from, ggml_type to) {
    return from == GGML_TYPE_F32 && ggml_rq_is_type(to)   ? device->pipeline_cpy_f32_quant[to] :
           to   == GGML_TYPE_F32 && ggml_rq_is_type(from) ? device->pipeline_cpy_quant_f32[from] :
           to   == GGML_TYPE_F16 ? device->pipeline_rq_cpy_f16[from] : nullptr;
}

// computes the node if it is one of our rotations, which upstream's own for Hadamard matrices does not know
static bool ggml_vk_rq_rotate(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_tensor * dst) {
    const ggml_tensor * src  = dst->src[1];
    const int32_t       hint = ggml_get_op_params_i32(dst, 1);
    const int64_t       n    = src->ne[0];

    if (!ggml_rq_hint_is_rotation(hint) || ctx->num_additional_fused_ops != 0 || ggml_rq_hint_family(hint) > GGML_RQ_ROTOR ||
            (ggml_rq_hint_mode(hint) != GGML_RQ_BLOCK && ggml_rq_hint_mode(hint) != GGML_RQ_FULL) ||
            (n != 64 && n != 128 && n != 256) || dst->src[0]->ne[1] != n || src->type != GGML_TYPE_F32 || dst->type != GGML_TYPE_F32 ||
            !ggml_is_contiguous(src) || !ggml_is_contiguous(dst)) {
        return false;
    }
    vk_pipeline pipeline = ctx->device->pipeline_rq_rotate[ggml_rq_hint_family(hint)][n/128];
    ggml_pipeline_request_descriptor_sets(ctx, pipeline, 1);

    const ggml_vk_rq_rotate_push_constants pc = { (uint32_t) ggml_nrows(src), get_misalign_bytes(ctx, src)/4, get_misalign_bytes(ctx, dst)/4,
        ggml_rq_hint_mode(hint) == GGML_RQ_FULL };
    const uint64_t most = (uint64_t) ctx->device->properties.limits.maxComputeWorkGroupCount[0]*pipeline->wg_denoms[0];
    ggml_vk_dispatch_pipeline(ctx, subctx, pipeline, { ggml_vk_tensor_subbuffer(ctx, src, true), ggml_vk_tensor_subbuffer(ctx, dst, true) }, pc,
        { (uint32_t) std::min<uint64_t>(pc.n_rows, most), 1, 1 });
    return true;
}

// Attention with recent rows (ggml-rq-types.h). Few queries: upstream's shaders over the cache, in two parts or more, and where
// these are put together the rows as one more. Many: K and V in f16 with the rows behind them, and upstream's shaders over these,
// under the tensor that both masks are views of. What either needs lies in the memory behind the result.

static inline bool ggml_vk_rq_recent_is_part(const ggml_tensor * dst) {
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    // a part has 64 rows at most; for f16 upstream has shaders that are in one part or in others
    return dst->src[0]->ne[1] < 32 && k->ne[1] > 64 && v->ne[0] <= 512 && k->ne[0] <= 576 && (k->type != GGML_TYPE_F16 || v->type != GGML_TYPE_F16);
}

struct ggml_vk_rq_recent_memory {
    ggml_tensor k = {}, v = {}, mask = {};
    size_t size = 0;

    explicit ggml_vk_rq_recent_memory(const ggml_tensor * dst) {
        const auto place = [&](const ggml_tensor * like, int64_t ne1, std::initializer_list<int> order) {
            ggml_tensor t = *like;
            t.type      = GGML_TYPE_F16;
            t.op        = GGML_OP_NONE;
            t.src[0]    = nullptr;
            t.view_src  = nullptr;
            t.view_offs = 0;
            t.buffer    = dst->buffer;
            t.ne[1]     = ne1;
            size_t nb = sizeof(ggml_fp16_t);
            for (const int i : order) {
                t.nb[i] = nb;
                nb *= t.ne[i];
            }
            size   = GGML_PAD(ggml_nbytes(dst) + size, 256) - ggml_nbytes(dst);
            t.data = (char *) dst->data + ggml_nbytes(dst) + size;
            size  += nb;
            return t;
        };
        if (ggml_vk_rq_recent_is_part(dst)) {
            mask = place(dst->src[3], dst->src[3]->ne[1], { 0, 1, 2, 3 });
        } else {
            mask = *dst->src[3];
            mask.ne[0] = ggml_rq_recent_width(dst);
            k = place(dst->src[1], mask.ne[0], { 0, 2, 1, 3 });
            v = place(dst->src[2], mask.ne[0], { 0, 2, 1, 3 });
        }
    }
};

// bytes behind a result
static inline size_t ggml_vk_rq_scratch(const ggml_tensor * t) {
    return ggml_rq_has_recent(t) ? ggml_vk_rq_recent_memory(t).size : 0;
}

static inline bool ggml_vk_rq_supports_recent(const vk_device & device, const ggml_tensor * dst) {
    const ggml_tensor * k = dst->src[1];
    for (const ggml_tensor * t : { k, (const ggml_tensor *) dst->src[2] }) {
        if (t->type != GGML_TYPE_F16 && !ggml_is_quantized(t->type)) {
            return false;
        }
    }
    for (const int i : { GGML_RQ_RECENT_K, GGML_RQ_RECENT_V, GGML_RQ_RECENT_K_NEW, GGML_RQ_RECENT_V_NEW }) {
        if (dst->src[i]->nb[0] != ggml_type_size(dst->src[i]->type)) {
            return false;
        }
    }
    if (ggml_rq_recent_width(dst) < k->ne[1] + dst->src[GGML_RQ_RECENT_K]->ne[1] + dst->src[GGML_RQ_RECENT_K_NEW]->ne[1]) {
        return false;
    }
    return ggml_vk_rq_scratch(dst) <= device->properties.limits.maxStorageBufferRange;
}

// rows of a cache, those held and those of this batch, one behind the other; what is left are copies of a row, since it is hidden but read
static void ggml_vk_rq_gather_rows(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_tensor * cells, const ggml_tensor * held,
        const ggml_tensor * fresh, const ggml_tensor & to) {
    int64_t first = 0;
    const auto append = [&](ggml_tensor from) {
        ggml_tensor part = to;
        part.ne[1] = from.ne[1];
        part.data  = (char *) to.data + first*to.nb[1];
        first += from.ne[1];
        if (from.ne[1] > 0) {
            ggml_vk_cpy(ctx, subctx, &from, &part);
        }
    };
    append(*cells);
    append(*held);
    append(*fresh);

    ggml_tensor rest = *fresh;
    rest.ne[1] = to.ne[1] - first;
    rest.nb[1] = 0;
    append(rest);
}

static void ggml_vk_rq_flash_attn_recent(ggml_backend_vk_context * ctx, vk_context & subctx, ggml_tensor * dst) {
    const ggml_vk_rq_recent_memory memory(dst);

    // other nodes may have used that memory, or will: upstream compares the memory of results alone
    ggml_vk_sync_buffers(ctx, subctx);
    if (ggml_vk_rq_recent_is_part(dst)) {
        // the shaders take a mask as it lies, row by row
        ggml_tensor mask = memory.mask;
        ggml_vk_cpy(ctx, subctx, dst->src[3], &mask);
        ggml_vk_sync_buffers(ctx, subctx);
        ggml_vk_flash_attn(ctx, subctx, dst->src[0], dst->src[1], dst->src[2], &mask, dst->src[4], dst);
    } else {
        ggml_vk_rq_gather_rows(ctx, subctx, dst->src[1], dst->src[GGML_RQ_RECENT_K], dst->src[GGML_RQ_RECENT_K_NEW], memory.k);
        ggml_vk_rq_gather_rows(ctx, subctx, dst->src[2], dst->src[GGML_RQ_RECENT_V], dst->src[GGML_RQ_RECENT_V_NEW], memory.v);
        ggml_vk_sync_buffers(ctx, subctx);
        ggml_tensor node = *dst;
        for (int i = GGML_RQ_RECENT_K; i < GGML_MAX_SRC; ++i) {
            node.src[i] = nullptr;
        }
        ggml_set_op_params_i32(&node, 4, 0); // n_kv_max of upstream's, which counts those that the cache alone shows
        ggml_vk_flash_attn(ctx, subctx, dst->src[0], &memory.k, &memory.v, &memory.mask, dst->src[4], &node);
    }
    ggml_vk_sync_buffers(ctx, subctx);
}

// the parts of the cache that upstream's shader has left, and the recent rows
static void ggml_vk_rq_combine_recent(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_tensor * dst, const vk_subbuffer & parts, uint32_t n_split) {
    const ggml_tensor * q     = dst->src[0];
    const ggml_tensor * k     = dst->src[GGML_RQ_RECENT_K];
    const ggml_tensor * v     = dst->src[GGML_RQ_RECENT_V];
    const ggml_tensor * k_new = dst->src[GGML_RQ_RECENT_K_NEW];
    const ggml_tensor * v_new = dst->src[GGML_RQ_RECENT_V_NEW];
    const ggml_tensor * sinks = dst->src[4];

    ggml_tensor mask = *dst->src[3]; // both
    mask.ne[0] = ggml_rq_recent_width(dst);

    ggml_vk_rq_recent_push_constants pc = {};
    pc.n_split = n_split;
    pc.n_held  = k->ne[1];
    pc.n_new   = k_new->ne[1];
    pc.group   = q->ne[2]/k->ne[2];
    pc.head_k  = k->ne[0];
    pc.head_v  = v->ne[0];
    for (int i = 0; i < 3; ++i) {
        pc.nb_q[i]     = q->nb[i + 1]/sizeof(float);
        pc.nb_k[i]     = k->nb[i + 1]/sizeof(ggml_fp16_t);
        pc.nb_v[i]     = v->nb[i + 1]/sizeof(ggml_fp16_t);
        pc.nb_k_new[i] = k_new->nb[i + 1]/sizeof(float);
        pc.nb_v_new[i] = v_new->nb[i + 1]/sizeof(float);
    }
    pc.nb_mask  = mask.nb[1]/sizeof(ggml_fp16_t);
    pc.nb_mask3 = mask.ne[3] == 1 ? 0 : mask.nb[3]/sizeof(ggml_fp16_t);
    pc.first    = dst->src[3]->ne[0];
    int shift = 0;
    for (const ggml_tensor * t : { k, v, k_new, v_new }) {
        pc.offsets |= get_misalign_bytes(ctx, t)/ggml_type_size(t->type) << shift;
        shift += 8;
    }
    const uint32_t n_head_log2 = 1u << (uint32_t) floorf(log2f((float) q->ne[2]));
    pc.n_head_log2_sinks = n_head_log2 | (sinks ? 1u << 24 : 0u);
    const float max_bias = ggml_get_op_params_f32(dst, 1);
    pc.m0      = powf(2.0f, -max_bias/n_head_log2);
    pc.m1      = powf(2.0f, -max_bias/2.0f/n_head_log2);
    pc.softcap = ggml_get_op_params_f32(dst, 2);
    pc.scale   = ggml_get_op_params_f32(dst, 0)/(pc.softcap != 0.0f ? pc.softcap : 1.0f);

    const auto buffer = [&](const ggml_tensor * t) { return ggml_vk_tensor_subbuffer(ctx, t, true); };
    ggml_pipeline_request_descriptor_sets(ctx, ctx->device->pipeline_rq_recent, 1);
    ggml_vk_dispatch_pipeline(ctx, subctx, ctx->device->pipeline_rq_recent,
        { parts, buffer(sinks ? sinks : q), buffer(dst), buffer(q), buffer(k), buffer(v), buffer(k_new), buffer(v_new), buffer(&mask) }, pc,
        { (uint32_t) q->ne[2], (uint32_t) q->ne[1], (uint32_t) q->ne[3] });
    ctx->prealloc_split_k_need_sync = true;
}

// True if the operation is for us to decide: it then goes to supported. An operation on our types that is not named here
// is not supported. Attention is upstream's, with our types among those that it takes for K and V.
static inline bool ggml_vk_rq_decides(const vk_device & device, const ggml_tensor * op, bool & supported) {
    bool ours = ggml_rq_is_type(op->type);
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        ours = ours || (op->src[i] && ggml_rq_is_type(op->src[i]->type));
    }

    // the encoder has one way to choose the scale (ggml-rq.c has more of them, to be compared with)
    const bool encodes = ggml_rq_scale_kind() == GGML_RQ_SCALE_INNER;

    supported = false;
    if (ggml_op_is_empty(op->op)) {
        return false;
    }
    switch (op->op) {
        case GGML_OP_FLASH_ATTN_EXT:
            return ggml_rq_has_recent(op) && !ggml_vk_rq_supports_recent(device, op);
        case GGML_OP_SET_ROWS:
            supported = ours && op->src[0]->type == GGML_TYPE_F32 &&
                (op->src[1]->type == GGML_TYPE_I64 || op->src[1]->type == GGML_TYPE_I32) && encodes;
            return ours;
        case GGML_OP_GET_ROWS:
            supported = op->type == GGML_TYPE_F32 && op->src[1]->type == GGML_TYPE_I32;
            return ours;
        case GGML_OP_CPY:
        case GGML_OP_DUP:
        case GGML_OP_CONT:
            // from a type to itself is upstream's
            supported = ggml_rq_is_type(op->type) ? op->src[0]->type == GGML_TYPE_F32 && encodes : op->type == GGML_TYPE_F32 || op->type == GGML_TYPE_F16;
            return ours && op->src[0]->type != op->type;
        default:
            return ours;
    }
}
