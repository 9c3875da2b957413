#include "common.h"
#include "dequantize.h"
#include "fa_vec_common.metal"
#include "rq.h"

// upstream's flash attention for few queries over the rotated cache types: one query per threadgroup, NE rows of the
// cache at once in a simdgroup

// types of Q, K and V in threadgroup memory, of Q*K, the softmax and the result
#define FA_TYPES half4, half4, half4, float, float, float4, float4

#define RQ_KV(block_q) block_q, QK_RQ/4, dequantize_rq_t4, block_q, QK_RQ/4, dequantize_rq_t4

typedef decltype(kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq2), 128, 128, 4>) flash_attn_ext_vec_rq_t;

// what fa_vec_pick is made to choose for them: with NE = 4 a thread decodes 16 values of a block from the bytes
// that it loads (dequantize_rq_t4), with NE = 1 only 4
template [[host_name("kernel_flash_attn_ext_vec_rq2_dk128_dv128_q1_ne4")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq2), 128, 128, 4>;
template [[host_name("kernel_flash_attn_ext_vec_rq3_dk128_dv128_q1_ne4")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq3), 128, 128, 4>;
template [[host_name("kernel_flash_attn_ext_vec_rq4_dk128_dv128_q1_ne4")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq4), 128, 128, 4>;
template [[host_name("kernel_flash_attn_ext_vec_rq2_dk256_dv256_q1_ne4")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq2), 256, 256, 4>;
template [[host_name("kernel_flash_attn_ext_vec_rq3_dk256_dv256_q1_ne4")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq3), 256, 256, 4>;
template [[host_name("kernel_flash_attn_ext_vec_rq4_dk256_dv256_q1_ne4")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq4), 256, 256, 4>;

// upstream's baseline, which it falls back to for lack of threadgroup memory
template [[host_name("kernel_flash_attn_ext_vec_rq2_dk128_dv128")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq2), 128, 128, 1>;
template [[host_name("kernel_flash_attn_ext_vec_rq3_dk128_dv128")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq3), 128, 128, 1>;
template [[host_name("kernel_flash_attn_ext_vec_rq4_dk128_dv128")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq4), 128, 128, 1>;
template [[host_name("kernel_flash_attn_ext_vec_rq2_dk256_dv256")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq2), 256, 256, 1>;
template [[host_name("kernel_flash_attn_ext_vec_rq3_dk256_dv256")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq3), 256, 256, 1>;
template [[host_name("kernel_flash_attn_ext_vec_rq4_dk256_dv256")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq4), 256, 256, 1>;
