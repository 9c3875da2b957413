#pragma once

// Flash attention for few queries over K and V of the rq types, of f16 or of q8_0, on int8 and f16 tensor cores.
//
// A CUDA block takes eight columns, a column being a query of one of the heads that share a KV head, and each of its
// warps its own rows of K and V: what is unpacked once serves all columns. K * Q is exact in integers: centroids (or
// the bytes of q8_0) times queries of 15 bits in two int8 planes. P * V runs in f16 with sums in f32. Values need not
// be put in order for that: a fragment of a matrix product takes whatever values of K or V one 32-bit word yields, and
// the queries and the result are arranged to match.

#include "rq-device.cuh"
#include "fattn-common.cuh"
#include "mma.cuh"

#define GGML_CUDA_RQ_FA_COLS  8 // columns of a CUDA block
#define GGML_CUDA_RQ_FA_WARPS 4

// P is at most 1; scaled by this it keeps its precision in f16 down to 1e-6, and weights below 5e-10 become zero
#define GGML_CUDA_RQ_FA_P_SCALE 64.0f

// heads that share the columns of a CUDA block, for so many query heads per KV head
static constexpr __host__ __device__ int ggml_cuda_rq_fa_heads(const int gqa_ratio) {
    return gqa_ratio > 4 ? 8 : gqa_ratio > 2 ? 4 : gqa_ratio;
}

// ---- rows of K and V in shared memory ----
//
// A row lies there as it does in global memory, from the last 16-byte boundary before it: shift bytes in.

// reads words of a row at any even offset
struct ggml_cuda_rq_load_shared {
    const uint32_t * row;
    int              start; // of what is read, in bytes

    __device__ __forceinline__ uint32_t operator()(const int offset) const {
        const int i = (start + offset) >> 2;
        return __funnelshift_r(row[i], row[i + 1], ((start + offset) & 2)*8);
    }

    __device__ __forceinline__ half scale(const int offset) const {
        return *(const half *) ((const char *) row + start + offset);
    }
};

// sixteen bytes from global to shared memory, zeros where there is nothing to read
static __device__ __forceinline__ void ggml_cuda_rq_copy16(uint32_t * dst, const char * src, const bool there) {
#ifdef CP_ASYNC_AVAILABLE
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
        : : "r"((uint32_t) __cvta_generic_to_shared(dst)), "l"(src), "r"(there ? 16 : 0) : "memory");
#else
    *(uint4 *) dst = there ? *(const uint4 *) src : make_uint4(0, 0, 0, 0);
#endif // CP_ASYNC_AVAILABLE
}

static __device__ __forceinline__ void ggml_cuda_rq_copy_commit() {
#ifdef CP_ASYNC_AVAILABLE
    asm volatile("cp.async.commit_group;" : : : "memory");
#endif // CP_ASYNC_AVAILABLE
}

// until at most n groups of copies are still under way
template <int n>
static __device__ __forceinline__ void ggml_cuda_rq_copy_wait() {
#ifdef CP_ASYNC_AVAILABLE
    asm volatile("cp.async.wait_group %0;" : : "n"(n) : "memory");
#endif // CP_ASYNC_AVAILABLE
}

// ---- what K and V are made of ----

typedef ggml_cuda_mma::tile<16, 8, int>   ggml_cuda_rq_tile_a8;
typedef ggml_cuda_mma::tile< 8, 8, int>   ggml_cuda_rq_tile_b8;
typedef ggml_cuda_mma::tile<16, 8, half2> ggml_cuda_rq_tile_a16;
typedef ggml_cuda_mma::tile< 8, 8, half2> ggml_cuda_rq_tile_b16;
typedef ggml_cuda_mma::tile<16, 8, float> ggml_cuda_rq_tile_c;

static __device__ __forceinline__ uint32_t ggml_cuda_rq_bits_of(const half2 h) {
    uint32_t u;
    memcpy(&u, &h, sizeof(u));
    return u;
}

static __device__ __forceinline__ half2 ggml_cuda_rq_half2_of(const uint32_t u) {
    half2 h;
    memcpy(&h, &u, sizeof(h));
    return h;
}

// hi and lo planes of K * Q with 32 more values of sixteen rows, a: two registers of row g, two of row g + 8
static __device__ __forceinline__ void ggml_cuda_rq_dot32(
        int (&sum)[2][4], const uint32_t a0, const uint32_t a1, const uint32_t a2, const uint32_t a3, const uint32_t * q_hi, const uint32_t * q_lo) {
    ggml_cuda_rq_tile_a8 a;
    a.x[0] = (int) a0; a.x[1] = (int) a1; a.x[2] = (int) a2; a.x[3] = (int) a3;
#pragma unroll
    for (int plane = 0; plane < 2; ++plane) {
        ggml_cuda_rq_tile_a8 c; // the accumulator has the same shape
        ggml_cuda_rq_tile_b8 b;
        b.x[0] = (int) (plane == 0 ? q_hi[0] : q_lo[0]);
        b.x[1] = (int) (plane == 0 ? q_hi[1] : q_lo[1]);
#pragma unroll
        for (int l = 0; l < 4; ++l) {
            c.x[l] = sum[plane][l];
        }
        ggml_cuda_mma::mma(c, a, b);
#pragma unroll
        for (int l = 0; l < 4; ++l) {
            sum[plane][l] = c.x[l];
        }
    }
}

// two dims of V times P: from four bytes of u8, (row 0, row 1) of the one dim and of the other, for rows 2*t, 2*t + 1 and for
// rows 2*t + 8, 2*t + 9; byte b stands for (b - 128)/unit
template <int unit>
static __device__ __forceinline__ void ggml_cuda_rq_mad_bytes(
        ggml_cuda_rq_tile_c & o, const uint32_t v01, const uint32_t v23, const half2 d01, const half2 d23, const ggml_cuda_rq_tile_b16 & p) {
    const half2 mul = make_half2(1.0f/unit, 1.0f/unit);
    const half2 add = make_half2(-1152.0f/unit, -1152.0f/unit);

    ggml_cuda_rq_tile_a16 a;
#pragma unroll
    for (int l = 0; l < 4; ++l) {
        // 0x6400 + b is 1024 + b in f16
        const uint32_t h = ggml_cuda_rq_prmt(l < 2 ? v01 : v23, 0x64646464, l % 2 == 0 ? 0x4140 : 0x4342);
        a.x[l] = __hmul2(__hfma2(ggml_cuda_rq_half2_of(h), mul, add), l < 2 ? d01 : d23);
    }
    ggml_cuda_mma::mma(o, a, p);
}

// Members of a code:
//   shift_max   rows may start so many bytes after a 16-byte boundary
//   unit        K is its integers times their scale over this
//   q_at        where value i of a query goes, for lane t of a group of four to find its D/4 values of a column together
//   dots        s += K * Q for rows g and g + 8 of sixteen and columns 2*t and 2*t + 1
//   mad         o += V * P for sixteen rows; o[8*b + i] holds values 128*b + dim(i) and the next one in columns 2*t, 2*t + 1

// first of the two values of V in tile i of a block of 128
static constexpr __host__ __device__ int ggml_cuda_rq_fa_dim(const int i, const int g) {
    return 4*(g + 8*(i/4)) + 64*(i/2 % 2) + 2*(i % 2);
}

template <int bits>
struct ggml_cuda_rq_kv {
    typedef ggml_cuda_rq_code<bits> code;
    static constexpr bool is_f16    = false;
    static constexpr int  shift_max = 14;
    static constexpr int  unit      = 128;

    static constexpr __host__ __device__ int row_bytes(const int D) { return D/QK_RQ*(int) sizeof(typename code::block); }

    static __device__ __forceinline__ int q_at(const int D, const int i) {
        const int w = i % 64/4; // word of a block
        return w % 4*(D/4) + i/128*32 + w/4*8 + i % 4/2*4 + i % 2*2 + i/64 % 2;
    }

    template <int D>
    static __device__ __forceinline__ void dots(
            float (&s)[4], const uint32_t * tile, const int stride, const int shift, const uint32_t (&q)[D/8], const int g, const int t) {
#pragma unroll
        for (int b = 0; b < D/QK_RQ; ++b) {
            uint32_t k[2][8];
            float    d[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const ggml_cuda_rq_load_shared load = { tile + (g + 8*r)*stride, shift + b*(int) sizeof(typename code::block) };
                d[r] = __half2float(load.scale(offsetof(typename code::block, d)));
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    uint32_t n[2];
                    code::words(load, t + 4*i, n);
                    k[r][2*i + 0] = code::template lookup<0>(n[0]);
                    k[r][2*i + 1] = code::template lookup<0>(n[0] >> 16);
                    k[r][2*i + 4] = code::template lookup<0>(n[1]);
                    k[r][2*i + 5] = code::template lookup<0>(n[1] >> 16);
                }
            }
            int sum[2][4] = {{ 0 }};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                ggml_cuda_rq_dot32(sum, k[0][2*i], k[1][2*i], k[0][2*i + 1], k[1][2*i + 1], q + 8*b + 2*i, q + D/16 + 8*b + 2*i);
            }
#pragma unroll
            for (int l = 0; l < 4; ++l) {
                s[l] += d[l/2] * (float) (sum[0][l]*128 + sum[1][l]);
            }
        }
    }

    template <int D>
    static __device__ __forceinline__ void mad(
            ggml_cuda_rq_tile_c * o, const uint32_t * tile, const int stride, const int shift0, const int shift1,
            const ggml_cuda_rq_tile_b16 & p, const int g, const int t) {
#pragma unroll
        for (int b = 0; b < D/QK_RQ; ++b) {
            uint32_t n[4][2]; // rows 2*t, 2*t + 1, 2*t + 8, 2*t + 9
            half     d[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const ggml_cuda_rq_load_shared load = {
                    tile + (2*t + r % 2 + r/2*8)*stride, (r % 2 == 0 ? shift0 : shift1) + b*(int) sizeof(typename code::block) };
                d[r] = load.scale(offsetof(typename code::block, d));
                code::words(load, g, n[r]);
            }
            const half2 d01 = make_half2(d[0], d[1]);
            const half2 d23 = make_half2(d[2], d[3]);
#pragma unroll
            for (int i = 0; i < 8; i += 2) {
                // nibbles of two rows side by side: of the lower 64 values, then of the upper ones
                const int a = i/4;
                uint32_t v01;
                uint32_t v23;
                if (i/2 % 2 == 0) {
                    v01 = (n[0][a] & 0x0F0F0F0F) | ((n[1][a] << 4) & 0xF0F0F0F0);
                    v23 = (n[2][a] & 0x0F0F0F0F) | ((n[3][a] << 4) & 0xF0F0F0F0);
                } else {
                    v01 = ((n[0][a] >> 4) & 0x0F0F0F0F) | (n[1][a] & 0xF0F0F0F0);
                    v23 = ((n[2][a] >> 4) & 0x0F0F0F0F) | (n[3][a] & 0xF0F0F0F0);
                }
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    ggml_cuda_rq_mad_bytes<unit>(o[8*b + i + k],
                        code::template lookup<128>(v01 >> 16*k), code::template lookup<128>(v23 >> 16*k), d01, d23, p);
                }
            }
        }
    }
};

struct ggml_cuda_rq_kv_q8_0 {
    static constexpr bool is_f16    = false;
    static constexpr int  shift_max = 14;
    static constexpr int  unit      = 1;

    static constexpr __host__ __device__ int row_bytes(const int D) { return D/QK8_0*(int) sizeof(block_q8_0); }

    static __device__ __forceinline__ int q_at(const int D, const int i) {
        return i % 16/4*(D/4) + i/16*4 + i % 4;
    }

    template <int D>
    static __device__ __forceinline__ void dots(
            float (&s)[4], const uint32_t * tile, const int stride, const int shift, const uint32_t (&q)[D/8], const int g, const int t) {
#pragma unroll
        for (int b = 0; b < D/QK8_0; ++b) {
            uint32_t k[2][2];
            float    d[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const ggml_cuda_rq_load_shared load = { tile + (g + 8*r)*stride, shift + b*(int) sizeof(block_q8_0) };
                d[r]    = __half2float(load.scale(offsetof(block_q8_0, d)));
                k[r][0] = load(offsetof(block_q8_0, qs) + 4*t);
                k[r][1] = load(offsetof(block_q8_0, qs) + 4*t + 16);
            }
            int sum[2][4] = {{ 0 }};
            ggml_cuda_rq_dot32(sum, k[0][0], k[1][0], k[0][1], k[1][1], q + 2*b, q + D/16 + 2*b);
#pragma unroll
            for (int l = 0; l < 4; ++l) {
                s[l] += d[l/2] * (float) (sum[0][l]*128 + sum[1][l]);
            }
        }
    }

    template <int D>
    static __device__ __forceinline__ void mad(
            ggml_cuda_rq_tile_c * o, const uint32_t * tile, const int stride, const int shift0, const int shift1,
            const ggml_cuda_rq_tile_b16 & p, const int g, const int t) {
#pragma unroll
        for (int i = 0; i < D/16; i += 2) {
            const int first = i/8*128 + ggml_cuda_rq_fa_dim(i % 8, 0); // of lane g = 0, the block is the same for all
            uint32_t v[4];
            half     d[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const ggml_cuda_rq_load_shared load = {
                    tile + (2*t + r % 2 + r/2*8)*stride, (r % 2 == 0 ? shift0 : shift1) + first/QK8_0*(int) sizeof(block_q8_0) };
                d[r] = load.scale(offsetof(block_q8_0, d));
                v[r] = load(offsetof(block_q8_0, qs) + 4*g) ^ 0x80808080;
            }
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const uint32_t pick = k == 0 ? 0x5140 : 0x7362;
                ggml_cuda_rq_mad_bytes<unit>(o[i + k], ggml_cuda_rq_prmt(v[0], v[1], pick), ggml_cuda_rq_prmt(v[2], v[3], pick),
                    make_half2(d[0], d[1]), make_half2(d[2], d[3]), p);
            }
        }
    }
};

struct ggml_cuda_rq_kv_f16 {
    static constexpr bool is_f16    = true;
    static constexpr int  shift_max = 0;
    static constexpr int  unit      = 1;

    static constexpr __host__ __device__ int row_bytes(const int D) { return D*(int) sizeof(half); }

    static __device__ __forceinline__ int q_at(const int D, const int i) {
        return i % 32/8*(D/4) + i/32*8 + i % 8;
    }

    template <int D>
    static __device__ __forceinline__ void dots(
            float (&s)[4], const uint32_t * tile, const int stride, const int, const uint32_t (&q)[D/8], const int g, const int t) {
        ggml_cuda_rq_tile_c c;
#pragma unroll
        for (int i = 0; i < D/32; ++i) {
            __align__(16) uint32_t k[2][4];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                ggml_cuda_memcpy_1<16>(k[r], tile + (g + 8*r)*stride + 16*i + 4*t);
            }
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                ggml_cuda_rq_tile_a16 a;
                ggml_cuda_rq_tile_b16 b;
#pragma unroll
                for (int l = 0; l < 4; ++l) {
                    a.x[l] = ggml_cuda_rq_half2_of(k[l % 2][j + l/2]);
                }
                b.x[0] = ggml_cuda_rq_half2_of(q[4*i + j]);
                b.x[1] = ggml_cuda_rq_half2_of(q[4*i + j + 1]);
                ggml_cuda_mma::mma(c, a, b);
            }
        }
#pragma unroll
        for (int l = 0; l < 4; ++l) {
            s[l] += c.x[l];
        }
    }

    template <int D>
    static __device__ __forceinline__ void mad(
            ggml_cuda_rq_tile_c * o, const uint32_t * tile, const int stride, const int, const int,
            const ggml_cuda_rq_tile_b16 & p, const int g, const int t) {
#pragma unroll
        for (int i = 0; i < D/16; i += 2) {
            const int first = i/8*128 + ggml_cuda_rq_fa_dim(i % 8, g);
            __align__(16) uint32_t v[4][2];
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                ggml_cuda_memcpy_1<8>(v[r], tile + (2*t + r % 2 + r/2*8)*stride + first/2);
            }
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                ggml_cuda_rq_tile_a16 a;
#pragma unroll
                for (int l = 0; l < 4; ++l) {
                    a.x[l] = ggml_cuda_rq_half2_of(ggml_cuda_rq_prmt(v[l/2*2][k], v[l/2*2 + 1][k], l % 2 == 0 ? 0x5410 : 0x7632));
                }
                ggml_cuda_mma::mma(o[i + k], a, p);
            }
        }
    }
};

// ---- sizes ----

template <int D, typename KC, typename VC>
struct ggml_cuda_rq_fa {
    // 16-byte pieces of a row, wherever it starts, and words from row to row: 4 modulo 8, so that no two lanes meet in a bank
    static constexpr __host__ __device__ int pieces(const int bytes, const int shift_max) { return (bytes + shift_max + 15)/16; }
    static constexpr __host__ __device__ int stride(const int n) { return n % 2 == 0 ? 4*n + 4 : 4*n; }

    static constexpr int pieces_k = pieces(KC::row_bytes(D), KC::shift_max);
    static constexpr int pieces_v = pieces(VC::row_bytes(D), VC::shift_max);
    static constexpr int stride_k = stride(pieces_k);
    static constexpr int stride_v = stride(pieces_v);

    static constexpr int row_bytes = (stride_k + stride_v)*4*GGML_CUDA_RQ_FA_WARPS;

    static constexpr int rows   = 2*32*row_bytes <= 48*1024 ? 32 : 16;      // of a warp in one pass
    static constexpr int stages = 2*rows*row_bytes <= 60*1024 ? 2 : 1;      // Turing has 64 KiB for a CUDA block
    static constexpr int words_stage = rows*(stride_k + stride_v);          // of a warp

    static constexpr int nb_rows    = stages*rows*row_bytes + 16;           // a load may look one word past the last row
    static constexpr int nb_result  = GGML_CUDA_RQ_FA_WARPS*GGML_CUDA_RQ_FA_COLS*(D + 2)*4;
    static constexpr int nb_queries = GGML_CUDA_RQ_FA_COLS*(2*D + 4);
    static constexpr int nb_shared  = nb_rows > nb_result ? nb_rows : nb_result;
    static_assert(nb_queries <= nb_shared, "queries do not fit");
};

// rows of a pass; tile is a multiple of 16 rows, that is of 16 bytes, after the first row, which shift belongs to
template <int rows, int row_bytes, int pieces, int stride>
static __device__ __forceinline__ void ggml_cuda_rq_fa_copy(
        uint32_t * dst, const char * tile, const int shift, const int nb1, const int n_rows, const int lane) {
#pragma unroll
    for (int i0 = 0; i0 < rows*pieces; i0 += WARP_SIZE) {
        const int i = i0 + lane;
        if (rows*pieces % WARP_SIZE == 0 || i < rows*pieces) {
            const int  row   = i/pieces;
            const int  piece = i % pieces;
            const int  at    = row*nb1;
            const int  start = (shift + at) & 15;
            // rows beyond the end get no weight, but must be numbers; behind a row there may be nothing
            const bool there = row < n_rows && 16*piece < start + row_bytes;
            ggml_cuda_rq_copy16(dst + row*stride + 4*piece, tile + (there ? at - start + 16*piece : -shift), there);
        }
    }
}

// a row of D values of Q times scale, as column col of the fragments
template <int D, typename KC>
static __device__ __forceinline__ void ggml_cuda_rq_fa_query(
        char * shared, const float * Q, const bool valid, const float scale, const int col, const int lane) {
    float * d = (float *) shared + col;
    char  * q = shared + GGML_CUDA_RQ_FA_COLS*4 + col*2*D;

    float v[D/32];
    float amax = 0.0f;
#pragma unroll
    for (int i = 0; i < D/32; ++i) {
        v[i] = valid ? scale*Q[32*i + lane] : 0.0f;
        amax = fmaxf(amax, fabsf(v[i]));
    }
    if constexpr (KC::is_f16) {
#pragma unroll
        for (int i = 0; i < D/32; ++i) {
            ((half *) q)[KC::q_at(D, 32*i + lane)] = __float2half_rn(v[i]);
        }
        amax = 1.0f;
    } else {
        amax = warp_reduce_max(amax);
        const float inv = amax > 0.0f ? 127.0f*128.0f/amax : 0.0f;
        amax *= 1.0f/(127.0f*128.0f);
#pragma unroll
        for (int i = 0; i < D/32; ++i) {
            const int n  = __float2int_rn(inv*v[i]);
            const int hi = (n + 64) >> 7;
            q[    KC::q_at(D, 32*i + lane)] = (char) hi;
            q[D + KC::q_at(D, 32*i + lane)] = (char) (n - 128*hi);
        }
    }
    if (lane == 0) {
        *d = amax/KC::unit;
    }
}

// ---- the kernel ----

template <int D, typename KC, typename VC>
__launch_bounds__(GGML_CUDA_RQ_FA_WARPS*WARP_SIZE, D == 128 ? 4 : 3) // so that registers allow 16 and 12 warps at once
static __global__ void ggml_cuda_rq_flash_attn_kernel(
        const char * Q, const char * K, const char * V, const char * mask, const char * sinks, const int * KV_max,
        float * dst, float2 * dst_meta,
        const float scale, const float max_bias, const float m0, const float m1, const uint32_t n_head_log2, const float logit_softcap,
        const int32_t ne00, const uint3   ne01, const int32_t ne02, const int32_t ne03,
                            const int32_t nb01, const int32_t nb02, const int32_t nb03,
        const int32_t ne10, const int32_t ne11, const int32_t ne12, const int32_t ne13,
                            const int32_t nb11, const int32_t nb12, const int64_t nb13,
                            const int32_t nb21, const int32_t nb22, const int64_t nb23,
                            const int32_t ne31, const int32_t ne32, const int32_t ne33,
                            const int32_t nb31, const int32_t nb32, const int64_t nb33) {
    ggml_cuda_pdl_lc();
#if defined(FLASH_ATTN_AVAILABLE) && defined(TURING_MMA_AVAILABLE)
    typedef ggml_cuda_rq_fa<D, KC, VC> fa;

    extern __shared__ uint4 ggml_cuda_rq_fa_shared[];
    uint32_t * shared = (uint32_t *) ggml_cuda_rq_fa_shared;

    const int lane = threadIdx.x;
    const int warp = threadIdx.y;
    const int g    = lane/4; // row of a fragment
    const int t    = lane%4; // its pair of columns

    // column c is query c / heads of head c % heads
    const int gqa_ratio = ne02/ne12;
    const int heads     = ggml_cuda_rq_fa_heads(gqa_ratio);
    const int nz        = (gqa_ratio + heads - 1)/heads;
    const int head_kv   = blockIdx.z/nz % ne12;
    const int sequence  = blockIdx.z/(nz*ne12);
    const int head_g    = blockIdx.z%nz*heads; // first head within its group
    const int head0     = head_kv*gqa_ratio + head_g;
    const int query0    = blockIdx.x*(GGML_CUDA_RQ_FA_COLS/heads);
    const auto is_valid = [&](const int c) { return query0 + c/heads < (int) ne01.z && head_g + c%heads < gqa_ratio; };

    Q += (int64_t) nb03*sequence;
    K += nb13*sequence + (int64_t) nb12*head_kv;
    V += nb23*sequence + (int64_t) nb22*head_kv;
    mask = mask ? mask + nb33*(sequence % ne33) : nullptr;

    ggml_cuda_pdl_sync();

    // queries, through shared memory, into registers
    uint32_t q[D/8];
    float    q_scale[2];
#pragma unroll
    for (int c = warp; c < GGML_CUDA_RQ_FA_COLS; c += GGML_CUDA_RQ_FA_WARPS) {
        ggml_cuda_rq_fa_query<D, KC>((char *) shared,
            (const float *) (Q + (int64_t) nb02*(head0 + c%heads) + (int64_t) nb01*(query0 + c/heads)), is_valid(c), scale, c, lane);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < D/8; ++i) {
        constexpr int n = KC::is_f16 ? D/8 : D/16; // words of a lane per plane
        q[i] = shared[GGML_CUDA_RQ_FA_COLS + g*(D/2) + i/n*(D/4) + t*n + i%n];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        q_scale[i] = ((const float *) shared)[2*t + i];
    }
    __syncthreads();

    const int n_kv    = KV_max ? KV_max[sequence*gridDim.x + blockIdx.x] : ne11;
    const int shift_k = (int) ((uintptr_t) (K + (int64_t) g*nb11) & 15); // row g + 8 has the same: nb11 is even
    const int shift_0 = (int) ((uintptr_t) (V + (int64_t) (2*t)*nb21) & 15);
    const int shift_1 = (int) ((uintptr_t) (V + (int64_t) (2*t + 1)*nb21) & 15);

    bool         valid[2];
    float        slope[2];
    const half * mask_col[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int c = 2*t + i;
        valid[i]    = is_valid(c);
        slope[i]    = valid[i] ? get_alibi_slope(max_bias, head0 + c%heads, n_head_log2, m0, m1) : 1.0f;
        mask_col[i] = mask && valid[i] ? (const half *) (mask + (int64_t) nb31*(query0 + c/heads)) : nullptr;
    }

    float               m[2] = { -FLT_MAX/2.0f, -FLT_MAX/2.0f }; // maxima of the columns so far
    float               l[2] = { 0.0f, 0.0f };                   // sums, of this lane's rows alone
    ggml_cuda_rq_tile_c o[D/16];

    // whether any query sees any row of a pass; what is masked for all is not read
    const auto is_live = [&](const int row0) {
        bool live = mask == nullptr;
        for (int j = 0; mask != nullptr && j < GGML_CUDA_RQ_FA_COLS/heads && query0 + j < (int) ne01.z; ++j) {
            const int row = row0 + lane % fa::rows;
            live = live || (row < n_kv && __half2float(((const half *) (mask + (int64_t) nb31*(query0 + j)))[row]) > -FLT_MAX);
        }
        return __any_sync(0xFFFFFFFF, live) != 0;
    };
    const int step = gridDim.y*GGML_CUDA_RQ_FA_WARPS*fa::rows;
    const auto next_live = [&](int row0) {
        while (row0 < n_kv && !is_live(row0)) {
            row0 += step;
        }
        return row0;
    };
    const auto copy = [&](uint32_t * to, const int row0) {
        ggml_cuda_rq_fa_copy<fa::rows, KC::row_bytes(D), fa::pieces_k, fa::stride_k>(
            to,                         K + (int64_t) row0*nb11, (int) (uintptr_t) K & 15, nb11, n_kv - row0, lane);
        ggml_cuda_rq_fa_copy<fa::rows, VC::row_bytes(D), fa::pieces_v, fa::stride_v>(
            to + fa::rows*fa::stride_k, V + (int64_t) row0*nb21, (int) (uintptr_t) V & 15, nb21, n_kv - row0, lane);
    };

    uint32_t * own   = shared + warp*fa::stages*fa::words_stage;
    int        stage = 0;
    int        row0  = next_live((blockIdx.y*GGML_CUDA_RQ_FA_WARPS + warp)*fa::rows);
    if (fa::stages == 2 && row0 < n_kv) {
        copy(own, row0);
    }
    ggml_cuda_rq_copy_commit();

    while (row0 < n_kv) {
        const int row0_next = next_live(row0 + step);
        if (fa::stages == 1) {
            copy(own, row0);
        } else if (row0_next < n_kv) {
            copy(own + (1 - stage)*fa::words_stage, row0_next);
        }
        ggml_cuda_rq_copy_commit();
        ggml_cuda_rq_copy_wait<fa::stages - 1>();
        ggml_cuda_syncwarp();

        const uint32_t * tile_k = own + stage*fa::words_stage;
        const uint32_t * tile_v = tile_k + fa::rows*fa::stride_k;

        // scores: rows g and g + 8 of each sixteen, columns 2*t and 2*t + 1
        float s[fa::rows/16][4];
        float m_new[2] = { m[0], m[1] };
#pragma unroll
        for (int r = 0; r < fa::rows/16; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[r][i] = 0.0f;
            }
            KC::template dots<D>(s[r], tile_k + 16*r*fa::stride_k, fa::stride_k, shift_k, q, g, t);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int c   = i % 2;
                const int row = row0 + 16*r + g + 8*(i/2);
                float v = s[r][i]*q_scale[c];
                if (logit_softcap != 0.0f) {
                    v = logit_softcap*tanhf(v);
                }
                if (mask_col[c] && row < n_kv) {
                    v += slope[c]*__half2float(mask_col[c][row]);
                }
                s[r][i]  = valid[c] && row < n_kv ? v : -INFINITY;
                m_new[c] = fmaxf(m_new[c], s[r][i]);
            }
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) {
#pragma unroll
            for (int offset = 4; offset < WARP_SIZE; offset *= 2) {
                m_new[c] = fmaxf(m_new[c], __shfl_xor_sync(0xFFFFFFFF, m_new[c], offset, WARP_SIZE));
            }
        }
        if (__any_sync(0xFFFFFFFF, m_new[0] > m[0] || m_new[1] > m[1])) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const float f = expf(m[c] - m_new[c]);
                m[c]  = m_new[c];
                l[c] *= f;
#pragma unroll
                for (int i = 0; i < D/16; ++i) {
                    o[i].x[c]     *= f;
                    o[i].x[c + 2] *= f;
                }
            }
        }

#pragma unroll
        for (int r = 0; r < fa::rows/16; ++r) {
            half2 p[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float p0 = expf(s[r][2*i]     - m[0]);
                const float p1 = expf(s[r][2*i + 1] - m[1]);
                l[0] += p0;
                l[1] += p1;
                p[i] = make_half2(__float2half_rn(GGML_CUDA_RQ_FA_P_SCALE*p0), __float2half_rn(GGML_CUDA_RQ_FA_P_SCALE*p1));
            }
            // rows of V whose weights are all zero in f16 are left out
            if (__any_sync(0xFFFFFFFF, (ggml_cuda_rq_bits_of(p[0]) | ggml_cuda_rq_bits_of(p[1])) != 0)) {
                ggml_cuda_rq_tile_b16 b;
                b.x[0] = ggml_cuda_movmatrix(p[0]);
                b.x[1] = ggml_cuda_movmatrix(p[1]);
                VC::template mad<D>(o, tile_v + 16*r*fa::stride_v, fa::stride_v, shift_0, shift_1, b, g, t);
            }
        }

        ggml_cuda_syncwarp();
        row0  = row0_next;
        stage = fa::stages == 1 ? 0 : 1 - stage;
    }

    // put the warps together
    ggml_cuda_rq_copy_wait<0>();
    __syncthreads();
    float2 * meta   = (float2 *) shared; // maximum and sum of each column of each warp
    float  * result = (float *) shared + 2*GGML_CUDA_RQ_FA_WARPS*GGML_CUDA_RQ_FA_COLS;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int offset = 4; offset < WARP_SIZE; offset *= 2) {
            l[c] += __shfl_xor_sync(0xFFFFFFFF, l[c], offset, WARP_SIZE);
        }
        const int col = warp*GGML_CUDA_RQ_FA_COLS + 2*t + c;
        if (g == 0) {
            meta[col] = make_float2(m[c], l[c]);
        }
#pragma unroll
        for (int i = 0; i < D/16; ++i) {
            const int dim = i/8*128 + ggml_cuda_rq_fa_dim(i % 8, g);
            *(float2 *) (result + col*D + dim) = make_float2(o[i].x[c], o[i].x[c + 2]);
        }
    }
    __syncthreads();

    const int tid = warp*WARP_SIZE + lane;
    for (int c = 0; c < GGML_CUDA_RQ_FA_COLS; ++c) {
        if (!is_valid(c)) {
            continue;
        }
        const int  head     = head0 + c%heads;
        const bool add_sink = sinks != nullptr && blockIdx.y == 0;

        float max = add_sink ? ((const float *) sinks)[head] : -FLT_MAX/2.0f;
#pragma unroll
        for (int w = 0; w < GGML_CUDA_RQ_FA_WARPS; ++w) {
            max = fmaxf(max, meta[w*GGML_CUDA_RQ_FA_COLS + c].x);
        }
        float sum = add_sink ? expf(((const float *) sinks)[head] - max) : 0.0f;
        float f[GGML_CUDA_RQ_FA_WARPS];
#pragma unroll
        for (int w = 0; w < GGML_CUDA_RQ_FA_WARPS; ++w) {
            const float2 ml = meta[w*GGML_CUDA_RQ_FA_COLS + c];
            f[w] = expf(ml.x - max);
            sum += f[w]*ml.y;
        }

        const int64_t at = ((int64_t) (sequence*(int) ne01.z + query0 + c/heads)*ne02 + head)*gridDim.y + blockIdx.y;
        for (int d = tid; d < D; d += GGML_CUDA_RQ_FA_WARPS*WARP_SIZE) {
            float v = 0.0f;
#pragma unroll
            for (int w = 0; w < GGML_CUDA_RQ_FA_WARPS; ++w) {
                v += f[w]*result[(w*GGML_CUDA_RQ_FA_COLS + c)*D + d];
            }
            v *= 1.0f/GGML_CUDA_RQ_FA_P_SCALE;
            dst[at*D + d] = gridDim.y == 1 ? v/sum : v;
        }
        if (gridDim.y != 1 && tid == 0) {
            dst_meta[at] = make_float2(max, sum);
        }
    }
#else
    GGML_UNUSED_VARS(Q, K, V, mask, sinks, KV_max, dst, dst_meta, scale, max_bias, m0, m1, n_head_log2, logit_softcap, nb01, nb02, nb03,
        nb11, nb12, nb13, nb21, nb22, nb23, nb31, nb32, nb33);
    NO_DEVICE_CODE;
#endif // defined(FLASH_ATTN_AVAILABLE) && defined(TURING_MMA_AVAILABLE)
    GGML_UNUSED_VARS(ne00, ne01, ne02, ne03, ne10, ne11, ne12, ne13, ne31, ne32, ne33, nb32);
}

// ---- which kernels there are ----

struct ggml_cuda_rq_fa_kernel {
    fattn_kernel_t kernel;     // nullptr where there is none
    void        (* prepare)(); // to be called before a launch
    int            nb_shared;  // bytes of shared memory
    int            rows;       // of K and V that a CUDA block takes in one pass
};

template <int D, typename KC, typename VC>
static void ggml_cuda_rq_fa_prepare() {
    CUDA_SET_SHARED_MEMORY_LIMIT((ggml_cuda_rq_flash_attn_kernel<D, KC, VC>), (ggml_cuda_rq_fa<D, KC, VC>::nb_shared));
}

template <int D, typename KC, typename VC>
static ggml_cuda_rq_fa_kernel ggml_cuda_rq_fa_make() {
    typedef ggml_cuda_rq_fa<D, KC, VC> fa;
    return { ggml_cuda_rq_flash_attn_kernel<D, KC, VC>, ggml_cuda_rq_fa_prepare<D, KC, VC>, fa::nb_shared, GGML_CUDA_RQ_FA_WARPS*fa::rows };
}

// V of our types, and where K is of ours also f16 and q8_0
template <int D, typename KC, bool k_is_ours>
static ggml_cuda_rq_fa_kernel ggml_cuda_rq_fa_find_v(const ggml_type type_v) {
    if constexpr (k_is_ours) {
        if (type_v == GGML_TYPE_F16) {
            return ggml_cuda_rq_fa_make<D, KC, ggml_cuda_rq_kv_f16>();
        }
        if (type_v == GGML_TYPE_Q8_0) {
            return ggml_cuda_rq_fa_make<D, KC, ggml_cuda_rq_kv_q8_0>();
        }
    }
    if (!ggml_rq_is_type(type_v)) {
        return {};
    }
    switch ((type_v - GGML_TYPE_PLANAR2) % 3) {
        case 0:  return ggml_cuda_rq_fa_make<D, KC, ggml_cuda_rq_kv<2>>();
        case 1:  return ggml_cuda_rq_fa_make<D, KC, ggml_cuda_rq_kv<3>>();
        default: return ggml_cuda_rq_fa_make<D, KC, ggml_cuda_rq_kv<4>>();
    }
}

template <typename KC, bool k_is_ours>
static ggml_cuda_rq_fa_kernel ggml_cuda_rq_fa_find(const int64_t head_dim, const ggml_type type_v) {
    switch (head_dim) {
        case 128: return ggml_cuda_rq_fa_find_v<128, KC, k_is_ours>(type_v);
        case 256: return ggml_cuda_rq_fa_find_v<256, KC, k_is_ours>(type_v);
        default:  return {};
    }
}

// by the kind of K, each in a file of its own, for the compiler's sake
ggml_cuda_rq_fa_kernel ggml_cuda_rq_fa_find_rq2 (int64_t head_dim, ggml_type type_v);
ggml_cuda_rq_fa_kernel ggml_cuda_rq_fa_find_rq3 (int64_t head_dim, ggml_type type_v);
ggml_cuda_rq_fa_kernel ggml_cuda_rq_fa_find_rq4 (int64_t head_dim, ggml_type type_v);
ggml_cuda_rq_fa_kernel ggml_cuda_rq_fa_find_f16 (int64_t head_dim, ggml_type type_v);
ggml_cuda_rq_fa_kernel ggml_cuda_rq_fa_find_q8_0(int64_t head_dim, ggml_type type_v);
