#pragma once

// Rows of K and V in shared memory, and their products with the queries and the weights, by a warp.
//
// All types but f16 are integers times a scale, and so are both other factors, of 15 bits in two int8 planes: sums are exact
// integers. Values need not be put in order for that: a fragment of a matrix product takes whatever values one 32-bit word
// yields, and the queries and the result are arranged to match. Lane t of group g: g = lane/4, t = lane%4, as in fragments.

#include "rq-device.cuh"
#include "mma.cuh"

#define GGML_CUDA_RQ_FA_COLS 8 // columns of a CUDA block: queries of heads that share a KV head

// factors of 15 bits are 256*hi + lo of int8, at most this
#define GGML_CUDA_RQ_FA_UNITS (127*256)

// ---- rows in shared memory ----
//
// A row lies there as it does in global memory, from the last 16-byte boundary before it: shift bytes in.

// reads words of a row at any even offset
struct ggml_cuda_rq_load_shared {
    const uint32_t * row;
    int              start; // of what is read, in bytes

    __device__ __forceinline__ uint32_t operator()(const int offset, const int shift = 0) const {
        const int i = (start + offset) >> 2;
        return __funnelshift_r(row[i], row[i + 1], ((start + offset) & 2)*8 + shift);
    }

    __device__ __forceinline__ float scale(const int offset) const {
        return __half2float(*(const half *) ((const char *) row + start + offset));
    }
};

// sixteen bytes from global to shared memory, zeros where there is nothing to read; the line's other bytes, of other heads, are
// wanted by other CUDA blocks
static __device__ __forceinline__ void ggml_cuda_rq_copy16(uint32_t * dst, const char * src, const bool there) {
#ifdef CP_ASYNC_AVAILABLE
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
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

// ---- fragments ----

typedef ggml_cuda_mma::tile<16, 8, int>   ggml_cuda_rq_tile_a8; // also that of sums
typedef ggml_cuda_mma::tile< 8, 8, int>   ggml_cuda_rq_tile_b8;
typedef ggml_cuda_mma::tile<16, 8, half2> ggml_cuda_rq_tile_a16;
typedef ggml_cuda_mma::tile< 8, 8, half2> ggml_cuda_rq_tile_b16;
typedef ggml_cuda_mma::tile<16, 8, float> ggml_cuda_rq_tile_c;

static __device__ __forceinline__ half2 ggml_cuda_rq_half2_of(const uint32_t u) {
    half2 h;
    memcpy(&h, &u, sizeof(h));
    return h;
}

// sum += a * b with n times 32 values
template <int n>
static __device__ __forceinline__ void ggml_cuda_rq_mma8(ggml_cuda_rq_tile_a8 & sum, const uint32_t (&a)[n][4], const uint32_t * b) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
        ggml_cuda_rq_tile_a8 ai;
        ggml_cuda_rq_tile_b8 bi;
#pragma unroll
        for (int l = 0; l < 4; ++l) {
            ai.x[l] = (int) a[i][l];
        }
        bi.x[0] = (int) b[2*i];
        bi.x[1] = (int) b[2*i + 1];
        ggml_cuda_mma::mma(sum, ai, bi);
    }
}

// a * (256*hi + lo)
template <int n>
static __device__ __forceinline__ ggml_cuda_rq_tile_a8 ggml_cuda_rq_product(const uint32_t (&a)[n][4], const uint32_t * hi, const uint32_t * lo) {
    ggml_cuda_rq_tile_a8 sum;
    ggml_cuda_rq_mma8<n>(sum, a, hi);
#pragma unroll
    for (int l = 0; l < 4; ++l) {
        sum.x[l] *= 256;
    }
    ggml_cuda_rq_mma8<n>(sum, a, lo);
    return sum;
}

// ---- types ----
//
//   shift_max   rows may start so many bytes after a 16-byte boundary
//   q_at        where value i of a query goes, for lane t of a group to find its D/4 values of a column together
// and of those that are integers times a scale:
//   values      that share a scale; they take bytes, the scale lies at d_at
//   unit        a value is its integer times the scale over this
//   unpack_k    the registers of a row for products with a query
//   unpack_v    words_v words of rows of V side by side: rows 2*t, 2*t + 1, 2*t + 8, 2*t + 9 of sixteen
//   bytes_v     the first (k = 0) or second dim of tile i of what unpack_v made, of the four rows
//   tile        tile i of block b, of all D/16 of a head of D values, in the order of blocks of N

// Tiles have the dims of a block of N = 128 or 64 as its words do: first of the two dims of tile i, for a lane of group g
static constexpr __host__ __device__ int ggml_cuda_rq_fa_dim(const int N, const int i, const int g) {
    return N == 128 ? i/8*128 + 4*(g + 8*(i/4%2)) + 64*(i/2%2) + 2*(i%2) : i/4*64 + 4*g + 32*(i/2%2) + 2*(i%2);
}

template <int bits, int N = QK_RQ>
struct ggml_cuda_rq_kv {
    typedef ggml_cuda_rq_code<bits, N> code;
    static constexpr bool is_f16    = false;
    static constexpr int  n_bits    = bits;
    static constexpr int  shift_max = 14;
    static constexpr int  values    = N;
    static constexpr int  bytes     = sizeof(typename code::block);
    static constexpr int  d_at      = offsetof(typename code::block, d);
    static constexpr int  unit      = 128;
    static constexpr int  words_v   = N/16;

    static constexpr __host__ __device__ int row_bytes(const int D) { return D/values*bytes; }

    static __device__ __forceinline__ int q_at(const int D, const int i) {
        const int w = i % (N/2)/4; // word of a block
        return w % 4*(D/4) + i/N*(N/4) + w/4*8 + i % 4/2*4 + i % 2*2 + i/(N/2) % 2;
    }

    static __device__ __forceinline__ void unpack_k(
            const ggml_cuda_rq_load_shared & row, const int t, const uint32_t zero, uint32_t (&k)[values/16]) {
#pragma unroll
        for (int i = 0; i < N/64; ++i) {
            uint32_t n[2];
            code::words(row, t + 4*i, n);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                k[2*i + j/2*(N/32) + j%2] = code::lookup(n[j/2], j%2, zero);
            }
        }
    }

    static __device__ __forceinline__ void unpack_v(const ggml_cuda_rq_load_shared (&row)[4], const int g, uint32_t (&x)[words_v]) {
        uint32_t n[4][2];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            if constexpr (N == 128) {
                code::words(row[r], g, n[r]);
            } else { // has one word per group
                n[r][0] = code::word(row[r], g);
            }
        }
#pragma unroll
        for (int i = 0; i < N/32; ++i) {
            // nibbles of two rows side by side, of the lower 64 values and of the upper ones, then those of four rows
            uint32_t m[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const uint32_t n0 = n[2*r    ][i/2];
                const uint32_t n1 = n[2*r + 1][i/2];
                m[r] = ggml_cuda_rq_select(i % 2 == 0 ? n0 : n0 >> 4, i % 2 == 0 ? n1 << 4 : n1, 0x0F0F0F0F);
            }
            x[2*i    ] = ggml_cuda_rq_prmt(m[0], m[1], 0x5140);
            x[2*i + 1] = ggml_cuda_rq_prmt(m[0], m[1], 0x7362);
        }
    }

    static __device__ __forceinline__ uint32_t bytes_v(const uint32_t (&x)[words_v], const int i, const int k, const uint32_t zero) {
        return code::lookup(x[i], k, zero);
    }

    static constexpr __device__ int tile(const int, const int b, const int i) { return N/16*b + i; }
};

struct ggml_cuda_rq_kv_q8_0 {
    static constexpr bool is_f16    = false;
    static constexpr int  shift_max = 14;
    static constexpr int  values    = QK8_0;
    static constexpr int  bytes     = sizeof(block_q8_0);
    static constexpr int  d_at      = offsetof(block_q8_0, d);
    static constexpr int  unit      = 1;
    static constexpr int  words_v   = 4;

    static constexpr __host__ __device__ int row_bytes(const int D) { return D/values*bytes; }

    static __device__ __forceinline__ int q_at(const int D, const int i) {
        return i % 16/4*(D/4) + i/16*4 + i % 4;
    }

    static __device__ __forceinline__ void unpack_k(
            const ggml_cuda_rq_load_shared & row, const int t, const uint32_t, uint32_t (&k)[values/16]) {
        k[0] = row(offsetof(block_q8_0, qs) + 4*t);
        k[1] = row(offsetof(block_q8_0, qs) + 4*t + 16);
    }

    // here x holds the bytes
    static __device__ __forceinline__ void unpack_v(const ggml_cuda_rq_load_shared (&row)[4], const int g, uint32_t (&x)[words_v]) {
        uint32_t v[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            v[r] = row[r](offsetof(block_q8_0, qs) + 4*g);
        }
        side_by_side(v, x);
    }

    // bytes of four rows
    static __device__ __forceinline__ void side_by_side(const uint32_t (&v)[4], uint32_t (&x)[words_v]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t pick = i == 0 ? 0x5140 : 0x7362;
            const uint32_t v01  = ggml_cuda_rq_prmt(v[0], v[1], pick);
            const uint32_t v23  = ggml_cuda_rq_prmt(v[2], v[3], pick);
            x[2*i    ] = ggml_cuda_rq_prmt(v01, v23, 0x5410);
            x[2*i + 1] = ggml_cuda_rq_prmt(v01, v23, 0x7632);
        }
    }

    static __device__ __forceinline__ uint32_t bytes_v(const uint32_t (&x)[words_v], const int i, const int k, const uint32_t) { return x[2*i + k]; }

    static constexpr __device__ int tile(const int order, const int b, const int i) {
        return order == 128 ? b/4*8 + b%2*4 + b/2%2*2 + i : b/2*4 + b%2*2 + i;
    }
};

// N of the tiles of D values of V: that of its blocks, or what divides the head
template <typename VC>
static constexpr __host__ __device__ int ggml_cuda_rq_fa_order(const int D) {
    if constexpr (!VC::is_f16) {
        if (VC::values == QK_RQ_64) {
            return QK_RQ_64;
        }
    }
    return D % QK_RQ == 0 ? QK_RQ : QK_RQ_64;
}

// a byte holds values i and i + 16, plus 8 each
struct ggml_cuda_rq_kv_q4_0 : ggml_cuda_rq_kv_q8_0 {
    static constexpr int bytes = sizeof(block_q4_0);
    static constexpr int d_at  = offsetof(block_q4_0, d);

    static constexpr __host__ __device__ int row_bytes(const int D) { return D/values*bytes; }

    // the low nibbles less 8, as int8
    static __device__ __forceinline__ uint32_t signed_bytes(const uint32_t n) {
        return ((n & 0x0F0F0F0F) + 0x78787878) ^ 0x80808080;
    }

    static __device__ __forceinline__ void unpack_k(
            const ggml_cuda_rq_load_shared & row, const int t, const uint32_t, uint32_t (&k)[values/16]) {
        const uint32_t n = row(offsetof(block_q4_0, qs) + 4*t);
        k[0] = signed_bytes(n);
        k[1] = signed_bytes(n >> 4);
    }

    static __device__ __forceinline__ void unpack_v(const ggml_cuda_rq_load_shared (&row)[4], const int g, uint32_t (&x)[words_v]) {
        uint32_t v[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            v[r] = signed_bytes(row[r](offsetof(block_q4_0, qs) + 4*(g%4), 4*(g/4)));
        }
        side_by_side(v, x);
    }
};

struct ggml_cuda_rq_kv_f16 {
    static constexpr bool is_f16    = true;
    static constexpr int  shift_max = 0;

    static constexpr __host__ __device__ int row_bytes(const int D) { return D*(int) sizeof(half); }

    static __device__ __forceinline__ int q_at(const int D, const int i) {
        return i % 32/8*(D/4) + i/32*8 + i % 8;
    }
};

// ---- products ----

// n words from shared memory, aligned to as many up to four
template <int n>
static __device__ __forceinline__ void ggml_cuda_rq_fa_read(uint32_t (&x)[n], const uint32_t * src) {
    constexpr int step = n < 4 ? n : 4;
#pragma unroll
    for (int i = 0; i < n; i += step) {
        ggml_cuda_memcpy_1<4*step>(x + i, src + i);
    }
}

// s = K * Q for rows g and g + 8 of each sixteen in tile and columns 2*t and 2*t + 1; query: the words of this lane
template <int D, int rows, typename KC>
static __device__ __forceinline__ void ggml_cuda_rq_fa_dots(
        float (&s)[rows/16][4], const uint32_t * tile, const int stride, const int shift, const uint32_t * query,
        const int g, const int t, const uint32_t zero) {
    if constexpr (KC::is_f16) {
        ggml_cuda_rq_tile_c sum[rows/16];
#pragma unroll
        for (int i = 0; i < D/32; ++i) {
            __align__(16) uint32_t q[4];
            ggml_cuda_rq_fa_read(q, query + 4*i);
#pragma unroll
            for (int r = 0; r < rows/16; ++r) {
                __align__(16) uint32_t k[2][4];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    ggml_cuda_rq_fa_read(k[j], tile + (16*r + g + 8*j)*stride + 16*i + 4*t);
                }
#pragma unroll
                for (int j = 0; j < 4; j += 2) {
                    ggml_cuda_rq_tile_a16 a;
                    ggml_cuda_rq_tile_b16 b;
#pragma unroll
                    for (int l = 0; l < 4; ++l) {
                        a.x[l] = ggml_cuda_rq_half2_of(k[l % 2][j + l/2]);
                    }
                    b.x[0] = ggml_cuda_rq_half2_of(q[j]);
                    b.x[1] = ggml_cuda_rq_half2_of(q[j + 1]);
                    ggml_cuda_mma::mma(sum[r], a, b);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < rows/4; ++i) {
            s[i/4][i%4] = sum[i/4].x[i%4];
        }
    } else {
        constexpr int n = KC::values/32;
#pragma unroll
        for (int b = 0; b < D/KC::values; ++b) {
            __align__(16) uint32_t hi[2*n];
            __align__(16) uint32_t lo[2*n];
            ggml_cuda_rq_fa_read(hi, query + 2*n*b);
            ggml_cuda_rq_fa_read(lo, query + 2*n*b + D/4);
#pragma unroll
            for (int r = 0; r < rows/16; ++r) {
                uint32_t a[n][4];
                float    d[2];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const ggml_cuda_rq_load_shared row = { tile + (16*r + g + 8*j)*stride, shift + b*KC::bytes };
                    uint32_t k[2*n];
                    KC::unpack_k(row, t, zero, k);
                    d[j] = row.scale(KC::d_at);
#pragma unroll
                    for (int i = 0; i < 2*n; ++i) {
                        a[i/2][i%2*2 + j] = k[i];
                    }
                }
                const ggml_cuda_rq_tile_a8 sum = ggml_cuda_rq_product<n>(a, hi, lo);
#pragma unroll
                for (int l = 0; l < 4; ++l) {
                    s[r][l] = d[l/2]*(float) sum.x[l] + (b == 0 ? 0.0f : s[r][l]);
                }
            }
        }
    }
}

// P is at most 1; in f16, scaled by this, it keeps its precision down to 1e-6
#define GGML_CUDA_RQ_FA_P_SCALE 64.0f

// o += P * V; p[r]: weights of rows g and g + 8 of sixteen rows, columns 2*t and 2*t + 1
// shift: of row g; shift0 and shift1: of rows 2*t and 2*t + 1; order: of the tiles of o
template <int D, int rows, typename VC, int order>
static __device__ __forceinline__ void ggml_cuda_rq_fa_mad(
        ggml_cuda_rq_tile_c (&o)[D/16], const uint32_t * tile, const int stride, const int shift, const int shift0, const int shift1,
        const float (&p)[rows/16][4], const int g, const int t, const uint32_t zero) {
    if constexpr (VC::is_f16) {
#pragma unroll
        for (int r = 0; r < rows/16; ++r) {
            ggml_cuda_rq_tile_b16 w;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                w.x[i] = ggml_cuda_movmatrix(make_half2(GGML_CUDA_RQ_FA_P_SCALE*p[r][2*i], GGML_CUDA_RQ_FA_P_SCALE*p[r][2*i + 1]));
            }
#pragma unroll
            for (int i = 0; i < D/16; i += 2) {
                __align__(8) uint32_t v[4][2];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    ggml_cuda_rq_fa_read(v[k], tile + (16*r + 2*t + k%2 + k/2*8)*stride + ggml_cuda_rq_fa_dim(order, i, g)/2);
                }
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    ggml_cuda_rq_tile_a16 a;
#pragma unroll
                    for (int l = 0; l < 4; ++l) {
                        a.x[l] = ggml_cuda_rq_half2_of(ggml_cuda_rq_prmt(v[l/2*2][k], v[l/2*2 + 1][k], l % 2 == 0 ? 0x5410 : 0x7632));
                    }
                    ggml_cuda_mma::mma(o[i + k], a, w);
                }
            }
        }
    } else {
        constexpr int n = (rows + 31)/32;
#pragma unroll
        for (int b = 0; b < D/VC::values; ++b) {
            // weights times scales, which are not negative, in units of the largest of a column
            float w[rows/16][4];
            float top[2] = { 1e-30f, 1e-30f };
#pragma unroll
            for (int r = 0; r < rows/16; ++r) {
                float d[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    d[i] = ggml_cuda_rq_load_shared{ tile + (16*r + g + 8*i)*stride, shift + b*VC::bytes }.scale(VC::d_at);
                }
#pragma unroll
                for (int l = 0; l < 4; ++l) {
                    w[r][l]  = p[r][l]*d[l/2];
                    top[l%2] = fmaxf(top[l%2], w[r][l]);
                }
            }
            float inv[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
#pragma unroll
                for (int offset = 4; offset < WARP_SIZE; offset *= 2) {
                    top[c] = fmaxf(top[c], __shfl_xor_sync(0xFFFFFFFF, top[c], offset, WARP_SIZE));
                }
                inv[c] = GGML_CUDA_RQ_FA_UNITS/top[c];
                top[c] *= 1.0f/GGML_CUDA_RQ_FA_UNITS/VC::unit;
            }

            // the last bits of 2^23 + x are the integer next to x; 128 more, and its bytes are hi and lo + 128
            uint32_t hi[2*n] = { 0 };
            uint32_t lo[2*n] = { 0 };
#pragma unroll
            for (int r = 0; r < rows/16; ++r) {
                uint32_t pair[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const uint32_t w0 = (uint32_t) __float_as_int(w[r][2*i    ]*inv[0] + (8388608.0f + 128.0f));
                    const uint32_t w1 = (uint32_t) __float_as_int(w[r][2*i + 1]*inv[1] + (8388608.0f + 128.0f));
                    pair[i] = (uint32_t) ggml_cuda_movmatrix((int) ggml_cuda_rq_prmt(w0, w1, 0x5410));
                }
                hi[r] = ggml_cuda_rq_prmt(pair[0], pair[1], 0x7531);
                lo[r] = ggml_cuda_rq_prmt(pair[0], pair[1], 0x6420) ^ 0x80808080;
            }

            uint32_t x[rows/16][VC::words_v];
#pragma unroll
            for (int r = 0; r < rows/16; ++r) {
                const uint32_t * at = tile + (16*r + 2*t)*stride;
                const int s0 = shift0 + b*VC::bytes;
                const int s1 = shift1 + b*VC::bytes;
                VC::unpack_v({ { at, s0 }, { at + stride, s1 }, { at + 8*stride, s0 }, { at + 9*stride, s1 } }, g, x[r]);
            }
#pragma unroll
            for (int i = 0; i < VC::values/16; ++i) {
                uint32_t a[n][4];
#pragma unroll
                for (int r = 0; r < 2*n; ++r) {
#pragma unroll
                    for (int k = 0; k < 2; ++k) {
                        a[r/2][r%2*2 + k] = r < rows/16 ? VC::bytes_v(x[r < rows/16 ? r : 0], i, k, zero) : 0;
                    }
                }
                const ggml_cuda_rq_tile_a8 sum = ggml_cuda_rq_product<n>(a, hi, lo);
#pragma unroll
                for (int l = 0; l < 4; ++l) {
                    o[VC::tile(order, b, i)].x[l] += top[l%2]*(float) sum.x[l];
                }
            }
        }
    }
}
