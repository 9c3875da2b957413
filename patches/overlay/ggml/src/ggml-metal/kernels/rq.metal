#include "common.h"
#include "dequantize.h"
#include "rq.h"
#include "rq-args.h"

// set_rows, get_rows, cpy, the f16 copy of a cache and recent rows for the rotated cache types; kernels by code, see
// ggml_metal_rq_type_name

// a simdgroup for each block, see ggml_metal_rq_set_rows
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
        quantize_rq<block_q, N_SIMDWIDTH>((device const int *) x + rq_code<block_q>::SIZE*ib, y[ib], tiisg);
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

// What goes into a cache turned on its way there: a mean off, times a matrix, see ggml_metal_rq_chain. A threadgroup for each part of a token.
template <typename block_q, typename map4>
kernel void kernel_rq_store(
        constant ggml_metal_kargs_rq_store & args,
        device const char   * x,
        device const float4 * mean,
        device const map4   * map,
        device const char   * idxs,
        device       char   * dst,
        device       float  * result,
        threadgroup  float4 * shared [[threadgroup(0)]],
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiitg[[thread_index_in_threadgroup]],
        ushort tiisg[[thread_index_in_simdgroup]],
        ushort sgitg[[simdgroup_index_in_threadgroup]]) {
    const int token = tgpig.x;
    const int part  = tgpig.y;
    const int n4    = args.n/4;

    device const float4 * in = (device const float4 *) (x + token*args.nb_token + part*args.nb_part);

    for (int i = tiitg; i < n4; i += RQ_STORE_NSG*N_SIMDWIDTH) {
        shared[i] = args.has_mean ? in[i] - mean[part*n4 + i] : in[i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    threadgroup float * y = (threadgroup float *) (shared + n4);

    map += (uint64_t) part*args.map_part/4;
    for (int row = sgitg; row < args.n; row += RQ_STORE_NSG) {
        float s = 0.0f;
        for (int i = tiisg; i < n4; i += N_SIMDWIDTH) {
            s += dot((float4) map[row*n4 + i], shared[i]);
        }
        s = simd_sum(s);
        if (tiisg == 0) {
            y[row] = s;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    result += ((uint64_t) token*args.n_part + part)*args.n;
    for (int i = tiitg; i < args.n; i += RQ_STORE_NSG*N_SIMDWIDTH) {
        result[i] = y[i];
    }

    device const char * idx = idxs + token*args.nb_idx;
    const int64_t row = args.is_i64 ? *(device const int64_t *) idx : *(device const int32_t *) idx;

    const int nb = args.n/rq_code<block_q>::SIZE;

    device block_q * blocks = (device block_q *) (dst + row*args.nb1) + part*nb;
    for (int ib = sgitg; ib < nb; ib += RQ_STORE_NSG) {
        quantize_rq<block_q, N_SIMDWIDTH>((threadgroup const int *) y + rq_code<block_q>::SIZE*ib, blocks[ib], tiisg);
    }
}

typedef decltype(kernel_rq_store<block_rq2, half4>)  kernel_rq_store_f16_t;
typedef decltype(kernel_rq_store<block_rq2, float4>) kernel_rq_store_f32_t;

template [[host_name("kernel_rq_store_rq2_f16")]] kernel kernel_rq_store_f16_t kernel_rq_store<block_rq2, half4>;
template [[host_name("kernel_rq_store_rq3_f16")]] kernel kernel_rq_store_f16_t kernel_rq_store<block_rq3, half4>;
template [[host_name("kernel_rq_store_rq4_f16")]] kernel kernel_rq_store_f16_t kernel_rq_store<block_rq4, half4>;
template [[host_name("kernel_rq_store_rq2_f32")]] kernel kernel_rq_store_f32_t kernel_rq_store<block_rq2, float4>;
template [[host_name("kernel_rq_store_rq3_f32")]] kernel kernel_rq_store_f32_t kernel_rq_store<block_rq3, float4>;
template [[host_name("kernel_rq_store_rq4_f32")]] kernel kernel_rq_store_f32_t kernel_rq_store<block_rq4, float4>;

template [[host_name("kernel_rq_store_rq2_64_f16")]] kernel kernel_rq_store_f16_t kernel_rq_store<block_rq2_64, half4>;
template [[host_name("kernel_rq_store_rq3_64_f16")]] kernel kernel_rq_store_f16_t kernel_rq_store<block_rq3_64, half4>;
template [[host_name("kernel_rq_store_rq4_64_f16")]] kernel kernel_rq_store_f16_t kernel_rq_store<block_rq4_64, half4>;
template [[host_name("kernel_rq_store_rq2_64_f32")]] kernel kernel_rq_store_f32_t kernel_rq_store<block_rq2_64, float4>;
template [[host_name("kernel_rq_store_rq3_64_f32")]] kernel kernel_rq_store_f32_t kernel_rq_store<block_rq3_64, float4>;
template [[host_name("kernel_rq_store_rq4_64_f32")]] kernel kernel_rq_store_f32_t kernel_rq_store<block_rq4_64, float4>;

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

    quantize_rq<block_q, 1>((device const int *) x + rq_code<block_q>::SIZE*at.i, y[at.i], 0);
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

// K or V as f16 for long queries, whose attention is upstream's own; a thread for each block
template <typename block_t, short SIZE, void (*decode)(device const block_t *, short, thread half4x4 &)>
kernel void kernel_rq_kv_f16(
        constant ggml_metal_kargs_rq_kv_f16 & args,
        device const char * x,
        device    half4x4 * y,
        uint gid [[thread_position_in_grid]]) {
    if (gid >= (uint) args.nblocks) {
        return;
    }

    const uint nb = args.ne0/SIZE;

    uint i = gid;
    const uint i0 = i%nb;       i /= nb;
    const uint i1 = i%args.ne1; i /= args.ne1;
    const uint i2 = i%args.ne2; i /= args.ne2;

    device const block_t * xb = (device const block_t *) (x + i0*args.nb0 + i1*args.nb1 + i2*args.nb2 + i*args.nb3);

    const uint64_t to = (((uint64_t) i*args.ne2 + i2)*args.rows + i1)*nb + i0;

    for (short k = 0; k < SIZE/16; ++k) {
        half4x4 reg;
        decode(xb, k, reg);
        y[(SIZE/16)*to + k] = reg;
    }
}

#define RQ_BLOCK(block_q) block_q, rq_code<block_q>::SIZE, dequantize_rq

typedef decltype(kernel_rq_kv_f16<RQ_BLOCK(block_rq2)>) kernel_rq_kv_f16_t;

template [[host_name("kernel_rq_kv_rq2_f16")]] kernel kernel_rq_kv_f16_t kernel_rq_kv_f16<RQ_BLOCK(block_rq2)>;
template [[host_name("kernel_rq_kv_rq3_f16")]] kernel kernel_rq_kv_f16_t kernel_rq_kv_f16<RQ_BLOCK(block_rq3)>;
template [[host_name("kernel_rq_kv_rq4_f16")]] kernel kernel_rq_kv_f16_t kernel_rq_kv_f16<RQ_BLOCK(block_rq4)>;

template [[host_name("kernel_rq_kv_rq2_64_f16")]] kernel kernel_rq_kv_f16_t kernel_rq_kv_f16<RQ_BLOCK(block_rq2_64)>;
template [[host_name("kernel_rq_kv_rq3_64_f16")]] kernel kernel_rq_kv_f16_t kernel_rq_kv_f16<RQ_BLOCK(block_rq3_64)>;
template [[host_name("kernel_rq_kv_rq4_64_f16")]] kernel kernel_rq_kv_f16_t kernel_rq_kv_f16<RQ_BLOCK(block_rq4_64)>;

// upstream's types where recent rows come behind them
template [[host_name("kernel_rq_kv_f16_f16")]]  kernel kernel_rq_kv_f16_t kernel_rq_kv_f16<half4x4, 16, dequantize_f16>;
template [[host_name("kernel_rq_kv_q4_0_f16")]] kernel kernel_rq_kv_f16_t kernel_rq_kv_f16<block_q4_0, 32, dequantize_q4_0>;
template [[host_name("kernel_rq_kv_q4_1_f16")]] kernel kernel_rq_kv_f16_t kernel_rq_kv_f16<block_q4_1, 32, dequantize_q4_1>;
template [[host_name("kernel_rq_kv_q5_0_f16")]] kernel kernel_rq_kv_f16_t kernel_rq_kv_f16<block_q5_0, 32, dequantize_q5_0>;
template [[host_name("kernel_rq_kv_q5_1_f16")]] kernel kernel_rq_kv_f16_t kernel_rq_kv_f16<block_q5_1, 32, dequantize_q5_1>;
template [[host_name("kernel_rq_kv_q8_0_f16")]] kernel kernel_rq_kv_f16_t kernel_rq_kv_f16<block_q8_0, 32, dequantize_q8_0>;

// Recent rows (ggml-rq-types.h): those that were held in f16, then those of this batch in f32

// values 4*i ... 4*i + 3 of a row
static inline float4 rq_recent_t4(device const char * held, device const char * fresh, constant ggml_metal_kargs_rq_rows & nb, int n_held, int row, int i) {
    if (row < n_held) {
        return (float4) ((device const half4 *) (held + row*nb.held[0]))[i];
    }
    return (float4) (half4) ((device const float4 *) (fresh + (row - n_held)*nb.fresh[0]))[i]; // as they will be held
}

// behind a copy in f16, and zeros behind them; a simdgroup for each row
kernel void kernel_rq_behind(
        constant ggml_metal_kargs_rq_behind & args,
        device const char * held,
        device const char * fresh,
        device       char * dst,
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiisg[[thread_index_in_simdgroup]]) {
    const int row = tgpig.x;

    held  += tgpig.y*args.nb.held [1] + tgpig.z*args.nb.held [2];
    fresh += tgpig.y*args.nb.fresh[1] + tgpig.z*args.nb.fresh[2];

    device half4 * y = (device half4 *) dst + (((uint64_t) tgpig.z*args.ne2 + tgpig.y)*args.rows + args.first + row)*(args.ne0/4);

    for (int i = tiisg; i < args.ne0/4; i += N_SIMDWIDTH) {
        y[i] = row < args.n ? (half4) rq_recent_t4(held, fresh, args.nb, args.n_held, row, i) : (half4) 0.0h;
    }
}

// Attention to them of one query and head, a simdgroup for every RQ_RECENT_NSG-th row, put together with what the vector kernel has
// left: the result over its rows in dst, sums and maxima of its parts.
kernel void kernel_rq_recent(
        constant ggml_metal_kargs_rq_recent & args,
        device const char   * q,
        device const char   * k,
        device const char   * v,
        device const char   * k_new,
        device const char   * v_new,
        device const char   * mask,
        device const float2 * parts,
        device       float4 * dst,
        threadgroup  float4 * shared [[threadgroup(0)]],
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiitg[[thread_index_in_threadgroup]],
        ushort tiisg[[thread_index_in_simdgroup]],
        ushort sgitg[[simdgroup_index_in_threadgroup]]) {
    const int i1 = tgpig.x;
    const int i2 = tgpig.y;
    const int i3 = tgpig.z;

    const int ikv = i2/args.group;
    const int DK4 = args.dk/4;
    const int DV4 = args.dv/4;

    device const float4 * q4 = (device const float4 *) (q + i1*args.nb01 + i2*args.nb02 + i3*args.nb03);
    device const half   * pm = (device const half   *) (mask + i1*args.nb_mask1 + (i3%args.ne_mask3)*args.nb_mask3);

    k     += ikv*args.k.held [1] + i3*args.k.held [2];
    v     += ikv*args.v.held [1] + i3*args.v.held [2];
    k_new += ikv*args.k.fresh[1] + i3*args.k.fresh[2];
    v_new += ikv*args.v.fresh[1] + i3*args.v.fresh[2];

    float slope = 1.0f;
    if (args.max_bias > 0.0f) {
        const bool first = i2 < args.n_head_log2;
        slope = pow(first ? args.m0 : args.m1, (float) (first ? i2 + 1 : 2*(i2 - args.n_head_log2) + 1));
    }

    float4 o[RQ_RECENT_MAX_DV/(4*N_SIMDWIDTH)];
    FOR_UNROLL (short j = 0; j < RQ_RECENT_MAX_DV/(4*N_SIMDWIDTH); ++j) {
        o[j] = 0.0f;
    }
    float S = 0.0f;
    float M = -FLT_MAX/2;

    for (int row = sgitg; row < args.n; row += RQ_RECENT_NSG) {
        const half m = pm[row];
        if (m <= -MAXHALF) {
            continue;
        }

        float s = 0.0f;
        for (int i = tiisg; i < DK4; i += N_SIMDWIDTH) {
            s += dot(q4[i], rq_recent_t4(k, k_new, args.k, args.n_held, row, i));
        }
        s = simd_sum(s)*args.scale;
        if (args.logit_softcap != 0.0f) {
            s = args.logit_softcap*precise::tanh(s);
        }
        s += slope*(float) m;

        const float M0 = M;
        M = max(M, s);

        const float ms = exp(M0 - M);
        const float vs = exp(s  - M);

        S = S*ms + vs;
        FOR_UNROLL (short j = 0; j < RQ_RECENT_MAX_DV/(4*N_SIMDWIDTH); ++j) {
            const int i = j*N_SIMDWIDTH + tiisg;
            if (i < DV4) {
                o[j] = o[j]*ms + rq_recent_t4(v, v_new, args.v, args.n_held, row, i)*vs;
            }
        }
    }

    threadgroup float2 * sums = (threadgroup float2 *) (shared + RQ_RECENT_NSG*DV4);

    FOR_UNROLL (short j = 0; j < RQ_RECENT_MAX_DV/(4*N_SIMDWIDTH); ++j) {
        const int i = j*N_SIMDWIDTH + tiisg;
        if (i < DV4) {
            shared[sgitg*DV4 + i] = o[j];
        }
    }
    if (tiisg == 0) {
        sums[sgitg] = float2(S, M);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const uint64_t rid = ((uint64_t) i3*args.n_query + i1)*args.n_head + i2;

    // all parts of the cache as one
    const float2 part = parts[rid*args.n_part + tiisg];
    float m_all = simd_max(part[1]);
    float s_cache = simd_sum(part[0]*exp(part[1] - m_all));
    const float m_cache = m_all;

    for (short j = 0; j < RQ_RECENT_NSG; ++j) {
        m_all = max(m_all, sums[j][1]);
    }
    s_cache *= exp(m_cache - m_all);

    float s_all = s_cache;
    for (short j = 0; j < RQ_RECENT_NSG; ++j) {
        s_all += sums[j][0]*exp(sums[j][1] - m_all);
    }
    const float scale = s_all == 0.0f ? 0.0f : 1.0f/s_all;

    dst += rid*DV4;
    for (int i = tiitg; i < DV4; i += RQ_RECENT_NSG*N_SIMDWIDTH) {
        float4 sum = dst[i]*s_cache;
        for (short j = 0; j < RQ_RECENT_NSG; ++j) {
            sum += shared[j*DV4 + i]*exp(sums[j][1] - m_all);
        }
        dst[i] = sum*scale;
    }
}
