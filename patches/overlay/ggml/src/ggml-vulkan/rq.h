#pragma once

// The rotated cache types on Vulkan: what upstream's host code asks of them. The shaders are vulkan-shaders/rq*.

#include "ggml-vulkan-common.h"
#include "ggml-rq-types.h"

// Pipelines by type, as upstream keeps its own; types of one code share them. create is upstream's way to make one, which
// does no more than name it until it is needed.
template <typename F>
static void ggml_vk_rq_pipelines(vk_device & device, const F & create) {
    for (int i = GGML_TYPE_PLANAR2; i <= GGML_TYPE_RQ4_64; i++) {
        const ggml_type type = (ggml_type) i;
        const ggml_type same = ggml_rq_is_sibling(type) ? type : (ggml_type) (GGML_TYPE_PLANAR2 + ggml_rq_type_bits(type) - 2);

        if (same != type) {
            device->pipeline_set_rows_i32[0][type]       = device->pipeline_set_rows_i32[0][same];
            device->pipeline_set_rows_i64[0][type]       = device->pipeline_set_rows_i64[0][same];
            device->pipeline_cpy_f32_quant[type]         = device->pipeline_cpy_f32_quant[same];
            device->pipeline_cpy_quant_f32[type]         = device->pipeline_cpy_quant_f32[same];
            device->pipeline_get_rows_f32[type]          = device->pipeline_get_rows_f32[same];
            device->pipeline_dequant_transpose[type]     = device->pipeline_dequant_transpose[same];
            continue;
        }

        const uint32_t bits = ggml_rq_type_bits(type);
        const uint32_t n    = ggml_rq_type_block(type);

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
        create(device, device->pipeline_get_rows_f32[type], "rq_get_rows", rq_get_rows_len, rq_get_rows_data, "main", 3,
            sizeof(vk_op_binary_push_constants), { 128, 1, 1 }, { 1, bits, n }, 1);
        create(device, device->pipeline_dequant_transpose[type], "rq_dequant_transpose", rq_dequant_transpose_len, rq_dequant_transpose_data, "main", 2,
            5*sizeof(uint32_t), { 4096, 1, 1 }, { 0, bits, n }, 1);
    }
}

// the pipeline of a copy from f32 into one of our types or from it to f32; null for other copies
static inline vk_pipeline ggml_vk_rq_cpy_pipeline(const vk_device & device, ggml_type from, ggml_type to) {
    return from == GGML_TYPE_F32 && ggml_rq_is_type(to)   ? device->pipeline_cpy_f32_quant[to] :
           to   == GGML_TYPE_F32 && ggml_rq_is_type(from) ? device->pipeline_cpy_quant_f32[from] : nullptr;
}

// True if the operation is for us to decide: it then goes to supported. An operation on our types that is not named here
// is not supported. Attention is upstream's, with our types among those that it takes for K and V.
static inline bool ggml_vk_rq_decides(const ggml_tensor * op, bool & supported) {
    bool ours = ggml_rq_is_type(op->type);
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        ours = ours || (op->src[i] && ggml_rq_is_type(op->src[i]->type));
    }

    const bool for_cpu = ggml_rq_op_is_for_cpu(op);

    // the encoder has one way to choose the scale (ggml-rq.c has more of them, to be compared with)
    const bool encodes = ggml_rq_scale_kind() == GGML_RQ_SCALE_INNER;

    supported = false;
    if (ggml_op_is_empty(op->op)) {
        return false;
    }
    switch (op->op) {
        case GGML_OP_FLASH_ATTN_EXT:
            // with more sources than upstream's it is another operation, whatever its types
            return op->src[GGML_RQ_RECENT_K] != nullptr || for_cpu;
        case GGML_OP_SET_ROWS:
            supported = ours && !for_cpu && op->src[0]->type == GGML_TYPE_F32 &&
                (op->src[1]->type == GGML_TYPE_I64 || op->src[1]->type == GGML_TYPE_I32) && encodes;
            return ours;
        case GGML_OP_GET_ROWS:
            supported = !for_cpu && op->type == GGML_TYPE_F32 && op->src[1]->type == GGML_TYPE_I32;
            return ours;
        case GGML_OP_CPY:
        case GGML_OP_DUP:
        case GGML_OP_CONT:
            // from a type to itself is upstream's
            supported = !for_cpu && (ggml_rq_is_type(op->type) ? op->src[0]->type == GGML_TYPE_F32 && encodes : op->type == GGML_TYPE_F32);
            return ours && op->src[0]->type != op->type;
        default:
            return ours;
    }
}
