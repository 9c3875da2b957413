#include "common.h"
#include "dequantize.h"
#include "rq.h"

// set_rows, get_rows, cpy and the f16 copy of a cache for the rotated cache types; kernels by code, see
// ggml_metal_rq_type_name

// a simdgroup for each block, see ggml_metal_rq_set_rows_threads
template <typename TI, typename block_q>
kernel void kernel_set_rows_rq(
        constant ggml_metal_kargs_set_rows & args,
        device const char * src0,
        device const char * src1,
        device       char * dst,
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiisg[[thread_index_in_simdgroup]],
        ushort sgitg[[simdgroup_index_in_threadgroup]],
        uint3  ntg  [[threads_per_threadgroup]]) {
    const int i01 = tgpig.x;
    const int i02 = tgpig.y;
    const int i03 = tgpig.z;

    const TI row = *(device const TI *) (src1 + i01*args.nb10 + (i02%args.ne11)*args.nb11 + (i03%args.ne12)*args.nb12);

    device const float * x = (device const float *) (src0 + i01*args.nb01 + i02*args.nb02 + i03*args.nb03);
    device block_q     * y = (device block_q     *) (dst  + row*args.nb1  + i02*args.nb2  + i03*args.nb3);

    for (int ib = sgitg; ib < args.nk0; ib += ntg.x/N_SIMDWIDTH) {
        quantize_rq<block_q, N_SIMDWIDTH>(x + rq_code<block_q>::SIZE*ib, y[ib], tiisg);
    }
}

typedef decltype(kernel_set_rows_rq<int64_t, block_rq2>) kernel_set_rows_rq64_t;
typedef decltype(kernel_set_rows_rq<int32_t, block_rq2>) kernel_set_rows_rq32_t;

template [[host_name("kernel_set_rows_f32_i64_rq2")]] kernel kernel_set_rows_rq64_t kernel_set_rows_rq<int64_t, block_rq2>;
template [[host_name("kernel_set_rows_f32_i64_rq3")]] kernel kernel_set_rows_rq64_t kernel_set_rows_rq<int64_t, block_rq3>;
template [[host_name("kernel_set_rows_f32_i64_rq4")]] kernel kernel_set_rows_rq64_t kernel_set_rows_rq<int64_t, block_rq4>;
template [[host_name("kernel_set_rows_f32_i32_rq2")]] kernel kernel_set_rows_rq32_t kernel_set_rows_rq<int32_t, block_rq2>;
template [[host_name("kernel_set_rows_f32_i32_rq3")]] kernel kernel_set_rows_rq32_t kernel_set_rows_rq<int32_t, block_rq3>;
template [[host_name("kernel_set_rows_f32_i32_rq4")]] kernel kernel_set_rows_rq32_t kernel_set_rows_rq<int32_t, block_rq4>;

template [[host_name("kernel_set_rows_f32_i64_rq2_64")]] kernel kernel_set_rows_rq64_t kernel_set_rows_rq<int64_t, block_rq2_64>;
template [[host_name("kernel_set_rows_f32_i64_rq3_64")]] kernel kernel_set_rows_rq64_t kernel_set_rows_rq<int64_t, block_rq3_64>;
template [[host_name("kernel_set_rows_f32_i64_rq4_64")]] kernel kernel_set_rows_rq64_t kernel_set_rows_rq<int64_t, block_rq4_64>;
template [[host_name("kernel_set_rows_f32_i32_rq2_64")]] kernel kernel_set_rows_rq32_t kernel_set_rows_rq<int32_t, block_rq2_64>;
template [[host_name("kernel_set_rows_f32_i32_rq3_64")]] kernel kernel_set_rows_rq32_t kernel_set_rows_rq<int32_t, block_rq3_64>;
template [[host_name("kernel_set_rows_f32_i32_rq4_64")]] kernel kernel_set_rows_rq32_t kernel_set_rows_rq<int32_t, block_rq4_64>;

// a thread for each 16 values
template <typename block_q>
kernel void kernel_get_rows_rq(
        constant ggml_metal_kargs_get_rows & args,
        device const char * src0,
        device const char * src1,
        device       char * dst,
        uint3   tgpig[[threadgroup_position_in_grid]],
        ushort  tiitg[[thread_index_in_threadgroup]],
        ushort3 ntg  [[threads_per_threadgroup]]) {
    const int i10 = tgpig.x%args.ne10;
    const int i11 = tgpig.y;
    const int i12 = tgpig.z;

    const int i = (tgpig.x/args.ne10)*ntg.x + tiitg;
    if (i >= args.ne00t) {
        return;
    }

    const int row = *(device const int32_t *) (src1 + i10*args.nb10 + i11*args.nb11 + i12*args.nb12);

    device const block_q * x = (device const block_q *) (src0 + row*args.nb01 + i11*args.nb02 + i12*args.nb03);
    device float4x4      * y = (device float4x4      *) (dst  + i10*args.nb1  + i11*args.nb2  + i12*args.nb3);

    float4x4 reg;
    const int n = rq_code<block_q>::SIZE/16; // parts of a block

    dequantize_rq(x + i/n, i%n, reg);
    y[i] = reg;
}

typedef decltype(kernel_get_rows_rq<block_rq2>) kernel_get_rows_rq_t;

template [[host_name("kernel_get_rows_rq2")]] kernel kernel_get_rows_rq_t kernel_get_rows_rq<block_rq2>;
template [[host_name("kernel_get_rows_rq3")]] kernel kernel_get_rows_rq_t kernel_get_rows_rq<block_rq3>;
template [[host_name("kernel_get_rows_rq4")]] kernel kernel_get_rows_rq_t kernel_get_rows_rq<block_rq4>;

template [[host_name("kernel_get_rows_rq2_64")]] kernel kernel_get_rows_rq_t kernel_get_rows_rq<block_rq2_64>;
template [[host_name("kernel_get_rows_rq3_64")]] kernel kernel_get_rows_rq_t kernel_get_rows_rq<block_rq3_64>;
template [[host_name("kernel_get_rows_rq4_64")]] kernel kernel_get_rows_rq_t kernel_get_rows_rq<block_rq4_64>;

// where the row of src0 that this thread works on begins, in src0 and in dst, which may be of another shape
struct rq_cpy_rows {
    int64_t  i;   // which part of the row: 16 values, or a block
    uint64_t src;
    uint64_t dst; // at the first value, or at its block
};

static inline rq_cpy_rows rq_cpy(constant ggml_metal_kargs_cpy & args, short n_dst, uint3 tgpig, ushort3 tpitg, ushort3 ntg) {
    const int64_t i01 = tgpig.x%args.ne01;
    const int64_t i02 = tgpig.y;
    const int64_t i03 = tgpig.z;

    int64_t n = ((i03*args.ne02 + i02)*args.ne01 + i01)*args.ne00;
    const int64_t i0 = n%args.ne0; n /= args.ne0;
    const int64_t i1 = n%args.ne1; n /= args.ne1;
    const int64_t i2 = n%args.ne2; n /= args.ne2;

    rq_cpy_rows res;
    res.i   = (tgpig.x/args.ne01)*ntg.x + tpitg.x;
    res.src = i01*args.nb01 + i02*args.nb02 + i03*args.nb03;
    res.dst = i0/n_dst*args.nb0 + i1*args.nb1 + i2*args.nb2 + n*args.nb3;
    return res;
}

// a thread for each block
template <typename block_q>
kernel void kernel_cpy_f32_rq(
        constant ggml_metal_kargs_cpy & args,
        device const char * src0,
        device       char * dst,
        uint3   tgpig[[threadgroup_position_in_grid]],
        ushort3 tpitg[[thread_position_in_threadgroup]],
        ushort3 ntg  [[threads_per_threadgroup]]) {
    const rq_cpy_rows at = rq_cpy(args, rq_code<block_q>::SIZE, tgpig, tpitg, ntg);
    if (at.i >= args.nk0) {
        return;
    }

    device const float * x = (device const float *) (src0 + at.src);
    device block_q     * y = (device block_q     *) (dst  + at.dst);

    quantize_rq<block_q, 1>(x + rq_code<block_q>::SIZE*at.i, y[at.i], 0);
}

typedef decltype(kernel_cpy_f32_rq<block_rq2>) kernel_cpy_f32_rq_t;

template [[host_name("kernel_cpy_f32_rq2")]] kernel kernel_cpy_f32_rq_t kernel_cpy_f32_rq<block_rq2>;
template [[host_name("kernel_cpy_f32_rq3")]] kernel kernel_cpy_f32_rq_t kernel_cpy_f32_rq<block_rq3>;
template [[host_name("kernel_cpy_f32_rq4")]] kernel kernel_cpy_f32_rq_t kernel_cpy_f32_rq<block_rq4>;

template [[host_name("kernel_cpy_f32_rq2_64")]] kernel kernel_cpy_f32_rq_t kernel_cpy_f32_rq<block_rq2_64>;
template [[host_name("kernel_cpy_f32_rq3_64")]] kernel kernel_cpy_f32_rq_t kernel_cpy_f32_rq<block_rq3_64>;
template [[host_name("kernel_cpy_f32_rq4_64")]] kernel kernel_cpy_f32_rq_t kernel_cpy_f32_rq<block_rq4_64>;

// a thread for each 16 values
template <typename block_q, typename type4x4>
kernel void kernel_cpy_rq_f(
        constant ggml_metal_kargs_cpy & args,
        device const char * src0,
        device       char * dst,
        uint3   tgpig[[threadgroup_position_in_grid]],
        ushort3 tpitg[[thread_position_in_threadgroup]],
        ushort3 ntg  [[threads_per_threadgroup]]) {
    const rq_cpy_rows at = rq_cpy(args, 1, tgpig, tpitg, ntg);
    if (at.i >= args.nk0) {
        return;
    }

    device const block_q * x = (device const block_q *) (src0 + at.src);
    device type4x4       * y = (device type4x4       *) (dst  + at.dst);

    type4x4 reg;
    const int n = rq_code<block_q>::SIZE/16; // parts of a block

    dequantize_rq(x + at.i/n, at.i%n, reg);
    y[at.i] = reg;
}

typedef decltype(kernel_cpy_rq_f<block_rq2, float4x4>) kernel_cpy_rq_f_t;

template [[host_name("kernel_cpy_rq2_f32")]] kernel kernel_cpy_rq_f_t kernel_cpy_rq_f<block_rq2, float4x4>;
template [[host_name("kernel_cpy_rq3_f32")]] kernel kernel_cpy_rq_f_t kernel_cpy_rq_f<block_rq3, float4x4>;
template [[host_name("kernel_cpy_rq4_f32")]] kernel kernel_cpy_rq_f_t kernel_cpy_rq_f<block_rq4, float4x4>;
template [[host_name("kernel_cpy_rq2_f16")]] kernel kernel_cpy_rq_f_t kernel_cpy_rq_f<block_rq2, half4x4>;
template [[host_name("kernel_cpy_rq3_f16")]] kernel kernel_cpy_rq_f_t kernel_cpy_rq_f<block_rq3, half4x4>;
template [[host_name("kernel_cpy_rq4_f16")]] kernel kernel_cpy_rq_f_t kernel_cpy_rq_f<block_rq4, half4x4>;

template [[host_name("kernel_cpy_rq2_64_f32")]] kernel kernel_cpy_rq_f_t kernel_cpy_rq_f<block_rq2_64, float4x4>;
template [[host_name("kernel_cpy_rq3_64_f32")]] kernel kernel_cpy_rq_f_t kernel_cpy_rq_f<block_rq3_64, float4x4>;
template [[host_name("kernel_cpy_rq4_64_f32")]] kernel kernel_cpy_rq_f_t kernel_cpy_rq_f<block_rq4_64, float4x4>;
template [[host_name("kernel_cpy_rq2_64_f16")]] kernel kernel_cpy_rq_f_t kernel_cpy_rq_f<block_rq2_64, half4x4>;
template [[host_name("kernel_cpy_rq3_64_f16")]] kernel kernel_cpy_rq_f_t kernel_cpy_rq_f<block_rq3_64, half4x4>;
template [[host_name("kernel_cpy_rq4_64_f16")]] kernel kernel_cpy_rq_f_t kernel_cpy_rq_f<block_rq4_64, half4x4>;

// K or V as contiguous f16 for long queries, whose attention is upstream's own; a thread for each block
template <typename block_q>
kernel void kernel_flash_attn_ext_kv_rq_f16(
        constant ggml_metal_kargs_flash_attn_ext_kv_f16 & args,
        device const char * x,
        device    half4x4 * y,
        uint gid [[thread_position_in_grid]]) {
    if (gid >= (uint) args.nblocks) {
        return;
    }

    const uint nb = args.ne0/rq_code<block_q>::SIZE;

    uint i = gid;
    const uint i0 = i%nb;       i /= nb;
    const uint i1 = i%args.ne1; i /= args.ne1;
    const uint i2 = i%args.ne2; i /= args.ne2;

    device const block_q * xb = (device const block_q *) (x + i0*args.nb0 + i1*args.nb1 + i2*args.nb2 + i*args.nb3);

    for (short k = 0; k < rq_code<block_q>::SIZE/16; ++k) {
        half4x4 reg;
        dequantize_rq(xb, k, reg);
        y[(rq_code<block_q>::SIZE/16)*gid + k] = reg;
    }
}

typedef decltype(kernel_flash_attn_ext_kv_rq_f16<block_rq2>) kernel_flash_attn_ext_kv_rq_f16_t;

template [[host_name("kernel_flash_attn_ext_kv_rq2_f16")]] kernel kernel_flash_attn_ext_kv_rq_f16_t kernel_flash_attn_ext_kv_rq_f16<block_rq2>;
template [[host_name("kernel_flash_attn_ext_kv_rq3_f16")]] kernel kernel_flash_attn_ext_kv_rq_f16_t kernel_flash_attn_ext_kv_rq_f16<block_rq3>;
template [[host_name("kernel_flash_attn_ext_kv_rq4_f16")]] kernel kernel_flash_attn_ext_kv_rq_f16_t kernel_flash_attn_ext_kv_rq_f16<block_rq4>;

template [[host_name("kernel_flash_attn_ext_kv_rq2_64_f16")]] kernel kernel_flash_attn_ext_kv_rq_f16_t kernel_flash_attn_ext_kv_rq_f16<block_rq2_64>;
template [[host_name("kernel_flash_attn_ext_kv_rq3_64_f16")]] kernel kernel_flash_attn_ext_kv_rq_f16_t kernel_flash_attn_ext_kv_rq_f16<block_rq3_64>;
template [[host_name("kernel_flash_attn_ext_kv_rq4_64_f16")]] kernel kernel_flash_attn_ext_kv_rq_f16_t kernel_flash_attn_ext_kv_rq_f16<block_rq4_64>;
