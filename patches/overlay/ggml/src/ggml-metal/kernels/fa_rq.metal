#include "common.h"
#include "dequantize.h"
#include "fa_common.metal"
#include "rq.h"

// upstream's flash attention with matrices over the rotated cache types

// types of Q, K and V in threadgroup memory, of Q*K, the softmax and the result, each with its vectors or matrices
#define FA_TYPES \
    half,  half4,   simdgroup_half8x8,  \
    half,  half4x4, simdgroup_half8x8,  \
    half,  half4x4, simdgroup_half8x8,  \
    float,          simdgroup_float8x8, \
    float, float2,  simdgroup_float8x8, \
    float, float4,  simdgroup_float8x8

#define RQ_KV2(block_k, block_v) block_k, rq_code<block_k>::SIZE/16, dequantize_rq, block_v, rq_code<block_v>::SIZE/16, dequantize_rq
#define RQ_KV(block_q) RQ_KV2(block_q, block_q)

typedef decltype(kernel_flash_attn_ext<FA_TYPES, RQ_KV(block_rq2), 128, 128>) flash_attn_ext_rq_t;

template [[host_name("kernel_flash_attn_ext_rq2_dk128_dv128")]] kernel flash_attn_ext_rq_t kernel_flash_attn_ext<FA_TYPES, RQ_KV(block_rq2), 128, 128>;
template [[host_name("kernel_flash_attn_ext_rq3_dk128_dv128")]] kernel flash_attn_ext_rq_t kernel_flash_attn_ext<FA_TYPES, RQ_KV(block_rq3), 128, 128>;
template [[host_name("kernel_flash_attn_ext_rq4_dk128_dv128")]] kernel flash_attn_ext_rq_t kernel_flash_attn_ext<FA_TYPES, RQ_KV(block_rq4), 128, 128>;
template [[host_name("kernel_flash_attn_ext_rq2_dk256_dv256")]] kernel flash_attn_ext_rq_t kernel_flash_attn_ext<FA_TYPES, RQ_KV(block_rq2), 256, 256>;
template [[host_name("kernel_flash_attn_ext_rq3_dk256_dv256")]] kernel flash_attn_ext_rq_t kernel_flash_attn_ext<FA_TYPES, RQ_KV(block_rq3), 256, 256>;
template [[host_name("kernel_flash_attn_ext_rq4_dk256_dv256")]] kernel flash_attn_ext_rq_t kernel_flash_attn_ext<FA_TYPES, RQ_KV(block_rq4), 256, 256>;

// heads of 64, and of 192 and 320 for K beside 128 and 256 for V: a name tells the blocks of K
template [[host_name("kernel_flash_attn_ext_rq2_64_dk64_dv64")]] kernel flash_attn_ext_rq_t kernel_flash_attn_ext<FA_TYPES, RQ_KV(block_rq2_64), 64, 64>;
template [[host_name("kernel_flash_attn_ext_rq3_64_dk64_dv64")]] kernel flash_attn_ext_rq_t kernel_flash_attn_ext<FA_TYPES, RQ_KV(block_rq3_64), 64, 64>;
template [[host_name("kernel_flash_attn_ext_rq4_64_dk64_dv64")]] kernel flash_attn_ext_rq_t kernel_flash_attn_ext<FA_TYPES, RQ_KV(block_rq4_64), 64, 64>;
template [[host_name("kernel_flash_attn_ext_rq2_64_dk192_dv128")]] kernel flash_attn_ext_rq_t kernel_flash_attn_ext<FA_TYPES, RQ_KV2(block_rq2_64, block_rq2), 192, 128>;
template [[host_name("kernel_flash_attn_ext_rq3_64_dk192_dv128")]] kernel flash_attn_ext_rq_t kernel_flash_attn_ext<FA_TYPES, RQ_KV2(block_rq3_64, block_rq3), 192, 128>;
template [[host_name("kernel_flash_attn_ext_rq4_64_dk192_dv128")]] kernel flash_attn_ext_rq_t kernel_flash_attn_ext<FA_TYPES, RQ_KV2(block_rq4_64, block_rq4), 192, 128>;
template [[host_name("kernel_flash_attn_ext_rq2_64_dk320_dv256")]] kernel flash_attn_ext_rq_t kernel_flash_attn_ext<FA_TYPES, RQ_KV2(block_rq2_64, block_rq2), 320, 256>;
template [[host_name("kernel_flash_attn_ext_rq3_64_dk320_dv256")]] kernel flash_attn_ext_rq_t kernel_flash_attn_ext<FA_TYPES, RQ_KV2(block_rq3_64, block_rq3), 320, 256>;
template [[host_name("kernel_flash_attn_ext_rq4_64_dk320_dv256")]] kernel flash_attn_ext_rq_t kernel_flash_attn_ext<FA_TYPES, RQ_KV2(block_rq4_64, block_rq4), 320, 256>;
