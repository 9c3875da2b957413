#include "common.h"
#include "dequantize.h"
#include "fa_vec_common.metal"
#include "rq.h"

// upstream's flash attention for few queries over the rotated cache types: one query per threadgroup, NE rows of the
// cache at once in a simdgroup

// types of Q, K and V in threadgroup memory, of Q*K, the softmax and the result
#define FA_TYPES half4, half4, half4, float, float, float4, float4

#define RQ_KV2(block_k, block_v) block_k, rq_code<block_k>::SIZE/4, dequantize_rq_t4, block_v, rq_code<block_v>::SIZE/4, dequantize_rq_t4
#define RQ_KV(block_q) RQ_KV2(block_q, block_q)

typedef decltype(kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq2), 128, 128, 4>) flash_attn_ext_vec_rq_t;

// Upstream's host code has no choices tuned for these types, so that it asks for its baseline, by a name without NE. That of
// upstream's types has NE = 1 here, where a thread would decode only 4 values of a block from the bytes that it loads: with
// NE = 4 it decodes 16 (dequantize_rq_t4). The host's launch is the same for any NE.
template [[host_name("kernel_flash_attn_ext_vec_rq2_dk128_dv128")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq2), 128, 128, 4>;
template [[host_name("kernel_flash_attn_ext_vec_rq3_dk128_dv128")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq3), 128, 128, 4>;
template [[host_name("kernel_flash_attn_ext_vec_rq4_dk128_dv128")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq4), 128, 128, 4>;
template [[host_name("kernel_flash_attn_ext_vec_rq2_dk256_dv256")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq2), 256, 256, 4>;
template [[host_name("kernel_flash_attn_ext_vec_rq3_dk256_dv256")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq3), 256, 256, 4>;
template [[host_name("kernel_flash_attn_ext_vec_rq4_dk256_dv256")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq4), 256, 256, 4>;

// heads of 64, and of 192 and 320 for K beside 128 and 256 for V: a name tells the blocks of K
template [[host_name("kernel_flash_attn_ext_vec_rq2_64_dk64_dv64")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq2_64), 64, 64, 4>;
template [[host_name("kernel_flash_attn_ext_vec_rq3_64_dk64_dv64")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq3_64), 64, 64, 4>;
template [[host_name("kernel_flash_attn_ext_vec_rq4_64_dk64_dv64")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq4_64), 64, 64, 4>;
template [[host_name("kernel_flash_attn_ext_vec_rq2_64_dk192_dv128")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV2(block_rq2_64, block_rq2), 192, 128, 4>;
template [[host_name("kernel_flash_attn_ext_vec_rq3_64_dk192_dv128")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV2(block_rq3_64, block_rq3), 192, 128, 4>;
template [[host_name("kernel_flash_attn_ext_vec_rq4_64_dk192_dv128")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV2(block_rq4_64, block_rq4), 192, 128, 4>;
template [[host_name("kernel_flash_attn_ext_vec_rq2_64_dk320_dv256")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV2(block_rq2_64, block_rq2), 320, 256, 4>;
template [[host_name("kernel_flash_attn_ext_vec_rq3_64_dk320_dv256")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV2(block_rq3_64, block_rq3), 320, 256, 4>;
template [[host_name("kernel_flash_attn_ext_vec_rq4_64_dk320_dv256")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV2(block_rq4_64, block_rq4), 320, 256, 4>;

// heads of 512, and of 576 of which V is the first 512 values (MLA): with matrices there are upstream's alone, over a copy in f16
template [[host_name("kernel_flash_attn_ext_vec_rq2_dk512_dv512")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq2), 512, 512, 4>;
template [[host_name("kernel_flash_attn_ext_vec_rq3_dk512_dv512")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq3), 512, 512, 4>;
template [[host_name("kernel_flash_attn_ext_vec_rq4_dk512_dv512")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq4), 512, 512, 4>;
template [[host_name("kernel_flash_attn_ext_vec_rq2_64_dk576_dv512")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq2_64), 576, 512, 4>;
template [[host_name("kernel_flash_attn_ext_vec_rq3_64_dk576_dv512")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq3_64), 576, 512, 4>;
template [[host_name("kernel_flash_attn_ext_vec_rq4_64_dk576_dv512")]] kernel flash_attn_ext_vec_rq_t kernel_flash_attn_ext_vec<FA_TYPES, RQ_KV(block_rq4_64), 576, 512, 4>;
