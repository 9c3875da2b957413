#pragma once

// Flash attention for few queries over K and V of the rq types, of f16 or of q8_0, on int8 and f16 tensor cores.
//
// A CUDA block takes eight columns, a column being a query of one of the heads that share a KV head, and each of its
// warps its own rows of K and V: what is unpacked once serves all columns. A warp needs no other until the end. While it
// works on rows of V the next ones of K are on their way to shared memory, and the other way round. Heads beyond 256 are for
// pairs of warps: each has a half of the values of the same rows, and they add up their products with the queries.

#include "rq-fattn-kv.cuh"
#include "fattn-common.cuh"

#define GGML_CUDA_RQ_FA_WARPS 4

// rows in which the weights of a lane add up to less than this are left out
#define GGML_CUDA_RQ_FA_P_MIN 5e-10f

// heads that share the columns of a CUDA block, for so many query heads per KV head
static constexpr __host__ __device__ int ggml_cuda_rq_fa_heads(const int gqa_ratio) {
    return gqa_ratio > 4 ? 8 : gqa_ratio > 2 ? 4 : gqa_ratio;
}

// how the rows of K or V of a type get to shared memory
template <int D, typename T>
struct ggml_cuda_rq_fa_copy {
    static constexpr int bytes  = T::row_bytes(D);
    static constexpr int pieces = (bytes + T::shift_max + 15)/16; // of 16 bytes, wherever a row starts
    static constexpr int stride = 4*(pieces | 1);                 // words from row to row: 4 modulo 8, so that no two lanes meet in a bank
    static constexpr int lanes  = pieces <= 4 ? 4 : pieces <= 8 ? 8 : pieces <= 16 ? 16 : 32; // of a row
    static constexpr int step   = WARP_SIZE/lanes;                // rows at once

    // where the first piece of a lane would be if all rows began at 16-byte boundaries
    static __device__ __forceinline__ const char * first(const char * x, const int nb1, const int lane) {
        return x + (int64_t) (lane/lanes)*nb1 + 16*(lane%lanes);
    }

    // rows beyond the end get no weight, but must be numbers
    template <int rows, bool whole>
    static __device__ __forceinline__ void copy(uint32_t * dst, const char * src, const int nb1, const int n_rows, const int lane) {
        static_assert(pieces <= lanes, "row does not fit");
        const int row   = lane/lanes;
        const int piece = lane%lanes;
        if (piece >= pieces) {
            return;
        }
        dst += row*stride + 4*piece;
#pragma unroll
        for (int i = 0; i < rows; i += step) {
            // nb1 is even: every eighth row starts alike
            const int  start = T::shift_max == 0 ? 0 : (int) (uintptr_t) (src + i%8*nb1) & 15;
            // behind a row there may be nothing
            const bool there = (whole || i + row < n_rows) && 16*piece < start + bytes;
            ggml_cuda_rq_copy16(dst + i*stride, src - start + (int64_t) i*nb1, there);
        }
    }

    template <int rows>
    static __device__ __forceinline__ void start(uint32_t * dst, const char * src, const int nb1, const int n_rows, const int lane) {
        if (n_rows >= rows) {
            copy<rows, true >(dst, src, nb1, n_rows, lane);
        } else if (n_rows > 0) {
            copy<rows, false>(dst, src, nb1, n_rows, lane);
        }
        ggml_cuda_rq_copy_commit();
    }
};

// ---- sizes ----

#define GGML_CUDA_RQ_FA_RECENT_ROWS 16 // recent ones of a warp in one pass

template <int D, typename KC, typename VC, int DV = D>
struct ggml_cuda_rq_fa {
    // warps that share a row: with more than 256 values of V the result would take more registers than a lane has
    static constexpr int halves = DV > 256 ? 2 : 1;
    static constexpr int teams  = GGML_CUDA_RQ_FA_WARPS/halves; // of such warps, each with its own rows
    static constexpr int dim_k  = (D/halves + 63)/64*64; // of a warp, whole blocks: of 576 values both have the middle ones
    static constexpr int next_k = D - dim_k;              // where those of the other half begin
    static constexpr int dim_v  = DV/halves;
    static constexpr int order  = ggml_cuda_rq_fa_order<VC>(dim_v);

    typedef ggml_cuda_rq_fa_copy<dim_k, KC> copy_k;
    typedef ggml_cuda_rq_fa_copy<dim_v, VC> copy_v;

    static constexpr int row_bytes = (copy_k::stride + copy_v::stride)*4*GGML_CUDA_RQ_FA_WARPS;

    static constexpr int words_lane  = KC::is_f16 ? dim_k/8 : dim_k/16;             // of a query
    static constexpr int words_query = dim_k/2 + (words_lane % 8 == 0 ? 4 : 16);     // of a column, with room against bank conflicts
    static constexpr int words_half  = GGML_CUDA_RQ_FA_COLS*words_query;            // of all columns, for the warps of a half
    static constexpr int nb_queries  = (halves*words_half + GGML_CUDA_RQ_FA_COLS*4)*4;

    // a load may look one word past the last row
    static constexpr __host__ __device__ int nb_loop(const int rows) { return nb_queries + rows*row_bytes + 16; }

    // of a warp in one pass: 64 where four CUDA blocks then fit an A100 or H100, or what fits Turing
    static constexpr int rows = nb_loop(64) <= 48*1024 ? 64 : nb_loop(32) <= 64*1024 ? 32 : 16;

    static constexpr int nb_result = GGML_CUDA_RQ_FA_WARPS*GGML_CUDA_RQ_FA_COLS*(dim_v + 2)*4;
    static constexpr int nb_shared = nb_loop(rows) > nb_result ? nb_loop(rows) : nb_result;
    static constexpr int words_recent = GGML_CUDA_RQ_FA_RECENT_ROWS*ggml_cuda_rq_fa_copy<(dim_k > dim_v ? dim_k : dim_v), ggml_cuda_rq_kv_f16>::stride; // of a warp
    static constexpr int nb_rows      = nb_queries + GGML_CUDA_RQ_FA_WARPS*words_recent*4;
    static constexpr int nb_recent    = nb_shared > nb_rows ? nb_shared : nb_rows;
    static_assert(nb_recent <= 64*1024, "too much shared memory");
};

// A row of D values of Q times scale, as a column of the fragments: the first n of them, and if that is not all, nb bytes behind them the last
// n, with zeros for those that are among the first, too. Returns what products with K are to be multiplied by.
template <int D, int n, int nb, typename KC>
static __device__ __forceinline__ float ggml_cuda_rq_fa_query(char * q, const float * Q, const bool valid, const float scale, const int lane) {
    float v[D/32];
    float amax = 0.0f;
#pragma unroll
    for (int i = 0; i < D/32; ++i) {
        v[i] = valid ? scale*Q[32*i + lane] : 0.0f;
        amax = fmaxf(amax, fabsf(v[i]));
    }
    float inv = 0.0f;
    if constexpr (!KC::is_f16) {
        amax = warp_reduce_max(amax);
        inv  = amax > 0.0f ? GGML_CUDA_RQ_FA_UNITS/amax : 0.0f;
    }
    const auto put = [&](char * at, const int i, const float value) {
        if constexpr (KC::is_f16) {
            ((half *) at)[KC::q_at(n, i)] = __float2half_rn(value);
        } else {
            const int x  = __float2int_rn(inv*value);
            const int hi = (x + 128) >> 8;
            at[    KC::q_at(n, i)] = (char) hi;
            at[n + KC::q_at(n, i)] = (char) (x - 256*hi);
        }
    };
#pragma unroll
    for (int i = 0; i < D; i += 32) {
        if (i < n) {
            put(q, i + lane, v[i/32]);
        }
        if (n < D && i >= D - n) {
            put(q + nb, i - (D - n) + lane, i < n ? 0.0f : v[i/32]);
        }
    }
    if constexpr (KC::is_f16) {
        return 1.0f;
    } else {
        return amax*(1.0f/GGML_CUDA_RQ_FA_UNITS/KC::unit);
    }
}

// Sums s of a warp and the one that has the other half of the same rows, in both; shared and theirs: what each of them lends for it, which
// neither uses for anything else before this returns. s is aligned to 16 bytes; id: of the pair
template <int rows>
static __device__ __forceinline__ void ggml_cuda_rq_fa_add_halves(
        float (&s)[rows/16][4], uint32_t * shared, const uint32_t * theirs, const int id, const int lane) {
#if defined(TURING_MMA_AVAILABLE)
#pragma unroll
    for (int i = 0; i < rows/16; ++i) {
        ggml_cuda_memcpy_1<16>(shared + 4*(WARP_SIZE*i + lane), s[i]);
    }
    __barrier_sync_count(1 + id, 2*WARP_SIZE); // barrier 0 is that of __syncthreads
#pragma unroll
    for (int i = 0; i < rows/16; ++i) {
        __align__(16) float other[4];
        ggml_cuda_memcpy_1<16>(other, theirs + 4*(WARP_SIZE*i + lane));
#pragma unroll
        for (int l = 0; l < 4; ++l) {
            s[i][l] += other[l]; // the same sum in both, and so all that follows from it
        }
    }
    __barrier_sync_count(1 + id, 2*WARP_SIZE);
#else
    GGML_UNUSED_VARS(s, shared, theirs, id, lane);
    NO_DEVICE_CODE;
#endif // defined(TURING_MMA_AVAILABLE)
}

// what becomes of a product of K with a column: softcap*tanh(scale*product), or factor*product, + slope*mask; factor and slope are for exp2
struct __align__(16) ggml_cuda_rq_fa_column {
    float scale;
    float factor;
    float slope;
    int   mask; // where the mask of its query is, in bytes
};

// hides rows from columns; row: of this lane
template <int rows, bool whole>
static __device__ __forceinline__ void ggml_cuda_rq_fa_hide(
        float (&s)[rows/16][4], const char * mask, const ggml_cuda_rq_fa_column (&col)[2], const int row, const int n_kv) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const half * at = (const half *) (mask + col[c].mask) + row;
#pragma unroll
        for (int i = 0; i < rows; i += 8) {
            float & v = s[i/16][i/8%2*2 + c];
            if (!whole && row + i >= n_kv) {
                v = -INFINITY;
            } else if (mask) {
                v += col[c].slope*__half2float(at[i]);
            }
        }
    }
}

// makes weights of the products s of rows row0 + g and so on with the columns; maxima, sums and results so far are brought to the new
// maxima. Returns what this lane's weights add up to.
template <int DV, int rows>
static __device__ __forceinline__ float ggml_cuda_rq_fa_weights(
        float (&s)[rows/16][4], float (&m)[2], float (&l)[2], ggml_cuda_rq_tile_c (&o)[DV/16], const ggml_cuda_rq_fa_column (&col)[2],
        const float logit_softcap, const char * mask, const int row0, const int g, const int n_kv) {
    if (logit_softcap != 0.0f) {
#pragma unroll
        for (int i = 0; i < rows/4; ++i) {
            s[i/4][i%4] = tanhf(col[i%2].scale*s[i/4][i%4]);
        }
    }
#pragma unroll
    for (int i = 0; i < rows/4; ++i) {
        s[i/4][i%4] *= col[i%2].factor;
    }
    if (row0 + rows > n_kv) {
        ggml_cuda_rq_fa_hide<rows, false>(s, mask, col, row0 + g, n_kv);
    } else if (mask) {
        ggml_cuda_rq_fa_hide<rows, true >(s, mask, col, row0 + g, n_kv);
    }

    float m_new[2] = { m[0], m[1] };
#pragma unroll
    for (int i = 0; i < rows/4; ++i) {
        m_new[i%2] = fmaxf(m_new[i%2], s[i/4][i%4]);
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
            const float f = exp2f(m[c] - m_new[c]);
            m[c]  = m_new[c];
            l[c] *= f;
#pragma unroll
            for (int i = 0; i < DV/16; ++i) {
                o[i].x[c]     *= f;
                o[i].x[c + 2] *= f;
            }
        }
    }

    float sum[2] = { 0.0f, 0.0f };
#pragma unroll
    for (int i = 0; i < rows/4; ++i) {
        s[i/4][i%4] = exp2f(s[i/4][i%4] - m[i%2]);
        sum[i%2] += s[i/4][i%4];
    }
    l[0] += sum[0];
    l[1] += sum[1];
    return sum[0] + sum[1];
}

// ---- recent rows ----

// rows row0 and so on of a head to shared memory, zeros behind the last
template <int D>
static __device__ __forceinline__ void ggml_cuda_rq_fa_load_recent(
        uint32_t * tile, const char * held, const int64_t nb_held, const char * fresh, const int64_t nb_fresh,
        const int n_held, const int n, const int row0, const int lane) {
    typedef ggml_cuda_rq_fa_copy<D, ggml_cuda_rq_kv_f16> copy;
    for (int i = lane/copy::lanes; i < GGML_CUDA_RQ_FA_RECENT_ROWS; i += copy::step) {
        const int row = row0 + i;
        for (int piece = lane%copy::lanes; piece < copy::pieces; piece += copy::lanes) { // of 8 values
            __align__(16) uint32_t x[4] = { 0, 0, 0, 0 };
            if (row < n_held) {
                ggml_cuda_memcpy_1<16>(x, held + row*nb_held + 16*piece);
            } else if (row < n) {
                __align__(16) float f[8];
                const char * from = fresh + (row - n_held)*nb_fresh + 32*piece;
                ggml_cuda_memcpy_1<16>(f,     from);
                ggml_cuda_memcpy_1<16>(f + 4, from + 16);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const half2 h = make_half2(__float2half_rn(f[2*j]), __float2half_rn(f[2*j + 1]));
                    memcpy(&x[j], &h, sizeof(h));
                }
            }
            ggml_cuda_memcpy_1<16>(tile + i*copy::stride + 4*piece, x);
        }
    }
}

// What a warp of part i of these has of the columns, as from rows of the cache; scaled: o is to be times GGML_CUDA_RQ_FA_P_SCALE. query
// and columns as the kernel has them, query of f16 and masks within that of these rows. fa: what the kernel does with rows of the cache
template <typename fa, bool scaled>
static __device__ __forceinline__ void ggml_cuda_rq_fa_attend_recent(
        float (&m)[2], float (&l)[2], ggml_cuda_rq_tile_c (&o)[fa::dim_v/16], const ggml_cuda_rq_recent & recent, uint32_t * tile, const uint32_t * tile_other,
        const uint32_t * query, const ggml_cuda_rq_fa_column * columns, const float logit_softcap,
        const int head_kv, const int sequence, const int i, const int warp, const int lane) {
    constexpr int rows = GGML_CUDA_RQ_FA_RECENT_ROWS;
    constexpr int D    = fa::dim_k;
    constexpr int DV   = fa::dim_v;
    constexpr int stride_k = ggml_cuda_rq_fa_copy<D,  ggml_cuda_rq_kv_f16>::stride;
    constexpr int stride_v = ggml_cuda_rq_fa_copy<DV, ggml_cuda_rq_kv_f16>::stride;
    const int g = lane/4;
    const int t = lane%4;

    const int part = warp%fa::halves;
    const int team = warp/fa::halves;
    const char * k     = recent.k     + head_kv*recent.nb_k[1]     + sequence*recent.nb_k[2]     + part*fa::next_k*(int) sizeof(half);
    const char * v     = recent.v     + head_kv*recent.nb_v[1]     + sequence*recent.nb_v[2]     + part*DV        *(int) sizeof(half);
    const char * k_new = recent.k_new + head_kv*recent.nb_k_new[1] + sequence*recent.nb_k_new[2] + part*fa::next_k*(int) sizeof(float);
    const char * v_new = recent.v_new + head_kv*recent.nb_v_new[1] + sequence*recent.nb_v_new[2] + part*DV        *(int) sizeof(float);
    const char * mask  = recent.mask  + sequence*recent.nb_mask3;
    const ggml_cuda_rq_fa_column col[2] = { columns[2*t], columns[2*t + 1] };

    for (int row0 = (i*fa::teams + team)*rows; row0 < recent.n; row0 += recent.parts*fa::teams*rows) {
        bool live = false; // whether any column sees any of these rows
        for (int c = lane/rows; c < GGML_CUDA_RQ_FA_COLS; c += WARP_SIZE/rows) {
            const int row = row0 + lane%rows;
            live = live || (row < recent.n && __half2float(((const half *) (mask + columns[c].mask))[row]) > -FLT_MAX);
        }
        if (!__any_sync(0xFFFFFFFF, live)) {
            continue;
        }
        ggml_cuda_rq_fa_load_recent<D>(tile, k, recent.nb_k[0], k_new, recent.nb_k_new[0], recent.n_held, recent.n, row0, lane);
        ggml_cuda_syncwarp();
        __align__(16) float s[rows/16][4];
        ggml_cuda_rq_fa_dots<D, rows, ggml_cuda_rq_kv_f16>(s, tile, stride_k, 0, query, g, t, 0);
        ggml_cuda_syncwarp();
        if constexpr (fa::halves == 2) {
            ggml_cuda_rq_fa_add_halves<rows>(s, tile, tile_other, team, lane);
        }
        ggml_cuda_rq_fa_weights<DV, rows>(s, m, l, o, col, logit_softcap, mask, row0, g, recent.n);
        ggml_cuda_rq_fa_load_recent<DV>(tile, v, recent.nb_v[0], v_new, recent.nb_v_new[0], recent.n_held, recent.n, row0, lane);
        ggml_cuda_syncwarp();
        ggml_cuda_rq_fa_mad<DV, rows, ggml_cuda_rq_kv_f16, fa::order>(o, tile, stride_v, 0, 0, 0, s, g, t, 0);
        ggml_cuda_syncwarp();
    }
    if constexpr (!scaled) {
#pragma unroll
        for (int j = 0; j < DV/4; ++j) {
            o[j/4].x[j%4] *= 1.0f/GGML_CUDA_RQ_FA_P_SCALE;
        }
    }
}

// ---- the kernel ----

// D: of K and the queries, DV: of V and the result
template <int D, typename KC, typename VC, int DV>
__launch_bounds__(GGML_CUDA_RQ_FA_WARPS*WARP_SIZE, DV <= 128 ? 4 : 3) // so that registers allow 16 and 12 warps at once
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
                            const int32_t nb31, const int32_t nb32, const int64_t nb33,
        const ggml_cuda_rq_recent recent) {
    ggml_cuda_pdl_lc();
#if defined(FLASH_ATTN_AVAILABLE) && defined(TURING_MMA_AVAILABLE)
    typedef ggml_cuda_rq_fa<D, KC, VC, DV> fa;

    extern __shared__ uint4 ggml_cuda_rq_fa_shared[];
    uint32_t * shared = (uint32_t *) ggml_cuda_rq_fa_shared;

    const int lane = threadIdx.x;
    const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.y, 0, WARP_SIZE); // known to be the same for all lanes
    const int g    = lane/4; // row of a fragment
    const int t    = lane%4; // its pair of columns
    const int part = warp%fa::halves; // of the rows of its team
    const int team = warp/fa::halves;

    // column c is query c / heads of head c % heads
    const int gqa_ratio = ne02/ne12;
    const int heads     = ggml_cuda_rq_fa_heads(gqa_ratio);
    const int nz        = (gqa_ratio + heads - 1)/heads;
    const int head_kv   = blockIdx.z/nz % ne12;
    const int sequence  = blockIdx.z/(nz*ne12);
    const int head_g    = blockIdx.z%nz*heads; // first head within its group
    const int head0     = head_kv*gqa_ratio + head_g;
    const int query0    = blockIdx.x*(GGML_CUDA_RQ_FA_COLS/heads);
    const int parts     = gridDim.y - recent.parts; // that share the rows of the cache
    const bool is_recent = (int) blockIdx.y >= parts;
    const auto is_valid = [&](const int c) { return query0 + c/heads < (int) ne01.z && head_g + c%heads < gqa_ratio; };

    Q += (int64_t) nb03*sequence;
    K += nb13*sequence + (int64_t) nb12*head_kv + part*KC::row_bytes(fa::next_k);
    V += nb23*sequence + (int64_t) nb22*head_kv + part*VC::row_bytes(fa::dim_v);
    mask = mask ? mask + nb33*(sequence % ne33) : nullptr;

    ggml_cuda_pdl_sync();

    // queries and what belongs to them, in shared memory
    constexpr float log2e = 1.44269504f;
    ggml_cuda_rq_fa_column * columns = (ggml_cuda_rq_fa_column *) shared;
    uint32_t * q_all = shared + GGML_CUDA_RQ_FA_COLS*sizeof(ggml_cuda_rq_fa_column)/4;
#pragma unroll
    for (int c = warp; c < GGML_CUDA_RQ_FA_COLS; c += GGML_CUDA_RQ_FA_WARPS) {
        const bool  valid   = is_valid(c);
        const int   head    = head0 + c%heads;
        const int   at      = query0 + c/heads;
        const float * q     = (const float *) (Q + (int64_t) nb02*head + (int64_t) nb01*at);
        char      * column  = (char *) (q_all + c*fa::words_query);
        const float q_scale = is_recent ? ggml_cuda_rq_fa_query<D, fa::dim_k, fa::words_half*4, ggml_cuda_rq_kv_f16>(column, q, valid, scale, lane) :
            ggml_cuda_rq_fa_query<D, fa::dim_k, fa::words_half*4, KC>(column, q, valid, scale, lane);
        if (lane == 0) {
            columns[c].scale  = q_scale;
            columns[c].factor = log2e*(logit_softcap == 0.0f ? q_scale : logit_softcap);
            columns[c].slope  = valid ? log2e*get_alibi_slope(max_bias, head, n_head_log2, m0, m1) : log2e;
            columns[c].mask   = (is_recent ? recent.nb_mask : nb31)*(valid ? at : query0);
        }
    }
    __syncthreads();
    q_all += part*fa::words_half;
    const uint32_t * query = q_all + g*fa::words_query + t*fa::words_lane;

    const int n_kv    = KV_max ? KV_max[sequence*gridDim.x + blockIdx.x] : ne11;
    const int shift_k = (int) (uintptr_t) (K + (int64_t) g*nb11) & 15; // row g + 8 has the same: nb11 is even
    const int shift_v = (int) (uintptr_t) (V + (int64_t) g*nb21) & 15;
    const int shift_0 = (int) (uintptr_t) (V + (int64_t) (2*t)*nb21) & 15;
    const int shift_1 = (int) (uintptr_t) (V + (int64_t) (2*t + 1)*nb21) & 15;
    const uint32_t zero = threadIdx.x/WARP_SIZE; // see ggml_cuda_rq_code

    float m[2]; // maxima of the columns so far, in units of 1/log2(e); those that are none get no weight
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        m[i] = is_valid(2*t + i) ? -FLT_MAX/2.0f : FLT_MAX/2.0f;
    }
    float l[2] = { 0.0f, 0.0f }; // sums, of this lane's rows alone
    ggml_cuda_rq_tile_c o[fa::dim_v/16];

    if (is_recent) { // before the loop, which then has nothing to do, so that the loop keeps its registers
        uint32_t * tiles = shared + fa::nb_queries/4;
        ggml_cuda_rq_fa_attend_recent<fa, VC::is_f16>(
            m, l, o, recent, tiles + warp*fa::words_recent, tiles + (warp ^ 1)*fa::words_recent,
            q_all + g*fa::words_query + t*(fa::dim_k/8), columns, logit_softcap, head_kv, sequence, (int) blockIdx.y - parts, warp, lane);
    }

    // whether any query sees any row of a pass; what is masked for all is not read
    const int n_masks = mask ? min(GGML_CUDA_RQ_FA_COLS/heads, (int) ne01.z - query0) : 0;
    const auto is_live = [&](const int row0) {
        bool live = n_masks == 0;
#pragma unroll 1
        for (int j = 0; j < n_masks; ++j) {
            const half * at = (const half *) (mask + (int64_t) nb31*(query0 + j));
#pragma unroll
            for (int i = 0; i < fa::rows; i += WARP_SIZE) {
                const int row = row0 + i + lane % fa::rows;
                live = live || (row < n_kv && __half2float(at[row]) > -FLT_MAX);
            }
        }
        return __any_sync(0xFFFFFFFF, live) != 0;
    };
    const int step = parts*fa::teams*fa::rows;
    const auto next_live = [&](int row0) {
        while (row0 < n_kv && !is_live(row0)) {
            row0 += step;
        }
        return row0;
    };
    typedef typename fa::copy_k copy_k;
    typedef typename fa::copy_v copy_v;
    constexpr int words_tiles = fa::rows*(copy_k::stride + copy_v::stride); // of a warp
    uint32_t   * tile_k = shared + fa::nb_queries/4 + warp*words_tiles;
    uint32_t   * tile_v = tile_k + fa::rows*copy_k::stride;
    const char * src_k  = copy_k::first(K, nb11, lane);
    const char * src_v  = copy_v::first(V, nb21, lane);

    int row0 = is_recent ? n_kv : next_live((blockIdx.y*fa::teams + team)*fa::rows);
    copy_k::template start<fa::rows>(tile_k, src_k + (int64_t) row0*nb11, nb11, n_kv - row0, lane);
    copy_v::template start<fa::rows>(tile_v, src_v + (int64_t) row0*nb21, nb21, n_kv - row0, lane);

    while (row0 < n_kv) {
        ggml_cuda_rq_copy_wait<1>(); // K is there
        ggml_cuda_syncwarp();

        // scores: rows g and g + 8 of each sixteen, columns 2*t and 2*t + 1
        __align__(16) float s[fa::rows/16][4];
        ggml_cuda_rq_fa_dots<fa::dim_k, fa::rows, KC>(s, tile_k, copy_k::stride, shift_k, query, g, t, zero);
        ggml_cuda_syncwarp();
        if constexpr (fa::halves == 2) { // rows of K are not wanted any more, nor the next ones on their way
            ggml_cuda_rq_fa_add_halves<fa::rows>(s, tile_k, tile_k + (part == 0 ? words_tiles : -words_tiles), team, lane);
        }
        const int row0_next = next_live(row0 + step);
        copy_k::template start<fa::rows>(tile_k, src_k + (int64_t) row0_next*nb11, nb11, n_kv - row0_next, lane);

        const ggml_cuda_rq_fa_column col[2] = { columns[2*t], columns[2*t + 1] };
        const float sum = ggml_cuda_rq_fa_weights<fa::dim_v, fa::rows>(s, m, l, o, col, logit_softcap, mask, row0, g, n_kv);

        ggml_cuda_rq_copy_wait<1>(); // V is there
        ggml_cuda_syncwarp();
        if (__any_sync(0xFFFFFFFF, sum > GGML_CUDA_RQ_FA_P_MIN)) {
            ggml_cuda_rq_fa_mad<fa::dim_v, fa::rows, VC, fa::order>(o, tile_v, copy_v::stride, shift_v, shift_0, shift_1, s, g, t, zero);
        }
        ggml_cuda_syncwarp();
        row0 = row0_next;
        copy_v::template start<fa::rows>(tile_v, src_v + (int64_t) row0*nb21, nb21, n_kv - row0, lane);
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
            meta[col] = make_float2(m[c]/log2e, l[c]);
        }
#pragma unroll
        for (int i = 0; i < fa::dim_v/16; ++i) {
            const int dim = ggml_cuda_rq_fa_dim(fa::order, i, g);
            *(float2 *) (result + col*fa::dim_v + dim) = make_float2(o[i].x[c], o[i].x[c + 2]);
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
        for (int i = 0; i < fa::teams; ++i) {
            max = fmaxf(max, meta[i*fa::halves*GGML_CUDA_RQ_FA_COLS + c].x);
        }
        float sum = add_sink ? expf(((const float *) sinks)[head] - max) : 0.0f;
        float f[fa::teams];
#pragma unroll
        for (int i = 0; i < fa::teams; ++i) {
            const float2 ml = meta[i*fa::halves*GGML_CUDA_RQ_FA_COLS + c];
            f[i] = expf(ml.x - max);
            sum += f[i]*ml.y;
        }

        const int64_t at = ((int64_t) (sequence*(int) ne01.z + query0 + c/heads)*ne02 + head)*gridDim.y + blockIdx.y;
        for (int d = tid; d < DV; d += GGML_CUDA_RQ_FA_WARPS*WARP_SIZE) {
            float v = 0.0f;
#pragma unroll
            for (int i = 0; i < fa::teams; ++i) {
                v += f[i]*result[((i*fa::halves + d/fa::dim_v)*GGML_CUDA_RQ_FA_COLS + c)*fa::dim_v + d%fa::dim_v];
            }
            v *= VC::is_f16 ? 1.0f/GGML_CUDA_RQ_FA_P_SCALE : 1.0f;
            dst[at*DV + d] = gridDim.y == 1 ? v/sum : v;
        }
        if (gridDim.y != 1 && tid == 0) {
            dst_meta[at] = make_float2(max, sum);
        }
    }
#else
    GGML_UNUSED_VARS(Q, K, V, mask, sinks, KV_max, dst, dst_meta, scale, max_bias, m0, m1, n_head_log2, logit_softcap, nb01, nb02, nb03,
        nb11, nb12, nb13, nb21, nb22, nb23, nb31, nb32, nb33, recent);
    NO_DEVICE_CODE;
#endif // defined(FLASH_ATTN_AVAILABLE) && defined(TURING_MMA_AVAILABLE)
    GGML_UNUSED_VARS(ne00, ne01, ne02, ne03, ne10, ne11, ne12, ne13, ne31, ne32, ne33, nb32);
}

// ---- which kernels there are ----

// as upstream's fattn_kernel_t
typedef void (* ggml_cuda_rq_fa_kernel_t)(
        const char *, const char *, const char *, const char *, const char *, const int *, float *, float2 *,
        float, float, float, float, uint32_t, float, int32_t, uint3, int32_t, int32_t, int32_t, int32_t, int32_t,
        int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, int64_t, int32_t, int32_t, int64_t,
        int32_t, int32_t, int32_t, int32_t, int32_t, int64_t, ggml_cuda_rq_recent);

struct ggml_cuda_rq_fa_kernel {
    ggml_cuda_rq_fa_kernel_t kernel; // nullptr where there is none
    void (* prepare)(); // to be called before a launch
    int     nb_shared;  // bytes of shared memory
    int     nb_recent;  // the same with recent rows
    int     rows;       // of K and V that a CUDA block takes in one pass
    int     rows_recent; // recent ones
};

template <int D, typename KC, typename VC, int DV = D>
static void ggml_cuda_rq_fa_prepare() {
    CUDA_SET_SHARED_MEMORY_LIMIT((ggml_cuda_rq_flash_attn_kernel<D, KC, VC, DV>), (ggml_cuda_rq_fa<D, KC, VC, DV>::nb_recent));
}

template <int D, typename KC, typename VC, int DV = D>
static ggml_cuda_rq_fa_kernel ggml_cuda_rq_fa_make() {
    typedef ggml_cuda_rq_fa<D, KC, VC, DV> fa;
    return { ggml_cuda_rq_flash_attn_kernel<D, KC, VC, DV>, ggml_cuda_rq_fa_prepare<D, KC, VC, DV>, fa::nb_shared, fa::nb_recent,
        fa::teams*fa::rows, fa::teams*GGML_CUDA_RQ_FA_RECENT_ROWS };
}

// V of our types, in blocks that its head_dim takes, and where K is of ours also f16 and q8_0
template <int D, int DV, typename KC, bool k_is_ours>
static ggml_cuda_rq_fa_kernel ggml_cuda_rq_fa_find_v(const ggml_type type_v) {
    constexpr int N = DV % QK_RQ == 0 ? QK_RQ : QK_RQ_64;

    if constexpr (k_is_ours) {
        if (type_v == GGML_TYPE_F16) {
            return ggml_cuda_rq_fa_make<D, KC, ggml_cuda_rq_kv_f16, DV>();
        }
        if (type_v == GGML_TYPE_Q8_0) {
            return ggml_cuda_rq_fa_make<D, KC, ggml_cuda_rq_kv_q8_0, DV>();
        }
    }
    if (!ggml_rq_is_type(type_v) || ggml_rq_type_block(type_v) != N) {
        return {};
    }
    switch (ggml_rq_type_bits(type_v)) {
        case 2:  return ggml_cuda_rq_fa_make<D, KC, ggml_cuda_rq_kv<2, N>, DV>();
        case 3:  return ggml_cuda_rq_fa_make<D, KC, ggml_cuda_rq_kv<3, N>, DV>();
        case 4:  return ggml_cuda_rq_fa_make<D, KC, ggml_cuda_rq_kv<4, N>, DV>();
        default: return {};
    }
}

// heads of 128, 256 and 512
template <typename KC, bool k_is_ours>
static ggml_cuda_rq_fa_kernel ggml_cuda_rq_fa_find(const int64_t head_dim_k, const int64_t head_dim_v, const ggml_type type_v) {
    if (head_dim_k == 128 && head_dim_v == 128) {
        return ggml_cuda_rq_fa_find_v<128, 128, KC, k_is_ours>(type_v);
    }
    if (head_dim_k == 256 && head_dim_v == 256) {
        return ggml_cuda_rq_fa_find_v<256, 256, KC, k_is_ours>(type_v);
    }
    if (head_dim_k == 512 && head_dim_v == 512) {
        return ggml_cuda_rq_fa_find_v<512, 512, KC, k_is_ours>(type_v);
    }
    return {};
}

// heads of 64, of 192 for K beside 128 for V, as upstream has them, and of the same bits 320 beside 256, and V as the first values of K: 512 of
// 576, 256 of 320
template <typename KC, bool k_is_ours>
static ggml_cuda_rq_fa_kernel ggml_cuda_rq_fa_find_64(const int64_t head_dim_k, const int64_t head_dim_v, const ggml_type type_v) {
    if (head_dim_k == 64 && head_dim_v == 64) {
        return ggml_cuda_rq_fa_find_v<64, 64, KC, k_is_ours>(type_v);
    }
    if (head_dim_k == 192 && head_dim_v == 128) {
        return ggml_cuda_rq_fa_find_v<192, 128, KC, k_is_ours>(type_v);
    }
    if constexpr (k_is_ours) {
        if (!ggml_rq_is_type(type_v) || ggml_rq_type_bits(type_v) != KC::n_bits) {
            return {};
        }
        if (head_dim_k == 320 && head_dim_v == 256) {
            return ggml_rq_is_sibling(type_v) ? ggml_cuda_rq_fa_make<320, KC, KC, 256>() : ggml_cuda_rq_fa_make<320, KC, ggml_cuda_rq_kv<KC::n_bits>, 256>();
        }
        if (head_dim_k == 576 && head_dim_v == 512 && ggml_rq_is_sibling(type_v)) {
            return ggml_cuda_rq_fa_make<576, KC, KC, 512>();
        }
    }
    return {};
}

// K and V alike, for types of upstream's with recent rows
template <typename C>
static ggml_cuda_rq_fa_kernel ggml_cuda_rq_fa_find_same(const int64_t head_dim_k, const int64_t head_dim_v) {
    switch (head_dim_k == head_dim_v ? head_dim_k : 0) {
        case  64: return ggml_cuda_rq_fa_make< 64, C, C>();
        case 128: return ggml_cuda_rq_fa_make<128, C, C>();
        case 256: return ggml_cuda_rq_fa_make<256, C, C>();
        case 512: return ggml_cuda_rq_fa_make<512, C, C>();
        default:  return {};
    }
}

// by the kind of K, each in a file of its own, for the compiler's sake
typedef ggml_cuda_rq_fa_kernel ggml_cuda_rq_fa_find_t(int64_t head_dim_k, int64_t head_dim_v, ggml_type type_v);

ggml_cuda_rq_fa_find_t ggml_cuda_rq_fa_find_rq2;
ggml_cuda_rq_fa_find_t ggml_cuda_rq_fa_find_rq3;
ggml_cuda_rq_fa_find_t ggml_cuda_rq_fa_find_rq4;
ggml_cuda_rq_fa_find_t ggml_cuda_rq_fa_find_rq2_64;
ggml_cuda_rq_fa_find_t ggml_cuda_rq_fa_find_rq3_64;
ggml_cuda_rq_fa_find_t ggml_cuda_rq_fa_find_rq4_64;
ggml_cuda_rq_fa_find_t ggml_cuda_rq_fa_find_f16;
ggml_cuda_rq_fa_find_t ggml_cuda_rq_fa_find_q8_0;
ggml_cuda_rq_fa_find_t ggml_cuda_rq_fa_find_q4_0;
