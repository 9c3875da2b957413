#pragma once

// Kernels that store, read and copy blocks of the rq cache types and that rotate rows. A warp takes a block or a row, or two
// of 64 values.

#include "rq-device.cuh"

#include <algorithm>

#define GGML_CUDA_RQ_WARPS 4 // of a CUDA block

// Where the rows of a tensor lie: ne in units of blocks, as upstream's fast division takes them, nb in bytes. Plain divisions,
// of 64 bits at that, would take the copying kernels more instructions than all else.
struct ggml_cuda_rq_rows {
    uint3   ne0, ne1, ne2;
    int64_t nb0, nb1, nb2, nb3;

    // the four indices of unit i in flat order
    __device__ __forceinline__ uint4 split(const uint32_t i) const {
        const uint2 a = fast_div_modulo(i,   ne0);
        const uint2 b = fast_div_modulo(a.x, ne1);
        const uint2 c = fast_div_modulo(b.x, ne2);
        return make_uint4(a.y, b.y, c.y, c.x);
    }

    __device__ __forceinline__ int64_t at(const uint32_t i) const {
        const uint4 k = split(i);
        return k.x*nb0 + k.y*nb1 + k.z*nb2 + k.w*nb3;
    }
};

static __device__ __forceinline__ int64_t ggml_cuda_rq_unit() {
    return (int64_t) blockIdx.x*GGML_CUDA_RQ_WARPS + threadIdx.y;
}

// which block or row the lanes of this lane take, where each is taken by so many; of the last warp some may be beyond the end
template <int lanes>
static __device__ __forceinline__ int64_t ggml_cuda_rq_unit_of_lanes() {
    return ggml_cuda_rq_unit()*(WARP_SIZE/lanes) + threadIdx.x/lanes;
}

// F32 -> blocks, each row to where idx says
template <typename code, typename idx_t>
static __global__ void ggml_cuda_rq_set_rows_kernel(
        const char * src, const char * idx, char * dst, const int64_t n, const ggml_cuda_rq_rows s,
        const uint3 ne11, const uint3 ne12, const int64_t nb10, const int64_t nb11, const int64_t nb12,
        const int64_t nb1, const int64_t nb2, const int64_t nb3, const int scale_kind) {
    constexpr int lanes = code::values/4;
    const int64_t i     = ggml_cuda_rq_unit_of_lanes<lanes>();
    const bool    valid = i < n; // all of a warp are needed to encode
    const int64_t at    = valid ? i : n - 1;
    const uint4   k     = s.split(at);

    ggml_cuda_pdl_sync();
    const int64_t row = *(const idx_t *) (idx + k.y*nb10 + fast_div_modulo(k.z, ne11).y*nb11 + fast_div_modulo(k.w, ne12).y*nb12);

    ggml_cuda_rq_quantize<code>((const float *) (src + s.at(at)), (typename code::block *) (dst + row*nb1 + k.z*nb2 + k.w*nb3) + k.x,
        threadIdx.x % lanes, scale_kind, valid);
}

// F32 -> blocks
template <typename code>
static __global__ void ggml_cuda_rq_quantize_kernel(
        const char * src, char * dst, const int64_t n, const ggml_cuda_rq_rows s, const ggml_cuda_rq_rows d, const int scale_kind) {
    constexpr int lanes = code::values/4;
    const int64_t i     = ggml_cuda_rq_unit_of_lanes<lanes>();
    const bool    valid = i < n;
    const int64_t at    = valid ? i : n - 1;

    ggml_cuda_pdl_sync();
    ggml_cuda_rq_quantize<code>((const float *) (src + s.at(at)), (typename code::block *) (dst + d.at(at)), threadIdx.x % lanes, scale_kind, valid);
}

// blocks -> F32 or F16; sixteen lanes take a block, or eight one of 64
template <typename code, typename T>
static __global__ void ggml_cuda_rq_dequantize_kernel(
        const char * src, char * dst, const int64_t n, const ggml_cuda_rq_rows s, const ggml_cuda_rq_rows d) {
    constexpr int lanes = code::values/8;
    const int64_t i = ggml_cuda_rq_unit_of_lanes<lanes>();
    if (i >= n) {
        return;
    }
    const int w = threadIdx.x % lanes;

    ggml_cuda_pdl_sync();
    float lo[4];
    float hi[4];
    ggml_cuda_rq_decode<code>((const typename code::block *) (src + s.at(i)), w, lo, hi);

    T * y = (T *) (dst + d.at(i));
    ggml_cuda_rq_write4(y + 4*w,                  lo);
    ggml_cuda_rq_write4(y + 4*w + code::values/2, hi);
}

// the rows of blocks that idx names -> F32; d has the shape of idx with a row of blocks before it
template <typename code>
static __global__ void ggml_cuda_rq_get_rows_kernel(
        const char * src, const char * idx, char * dst, const int64_t n, const ggml_cuda_rq_rows d,
        const int64_t nb10, const int64_t nb11, const int64_t nb12, const int64_t nb01, const int64_t nb02, const int64_t nb03) {
    constexpr int lanes = code::values/8;
    const int64_t i = ggml_cuda_rq_unit_of_lanes<lanes>();
    if (i >= n) {
        return;
    }
    const int   w = threadIdx.x % lanes;
    const uint4 k = d.split(i);

    ggml_cuda_pdl_sync();
    const int64_t row = *(const int32_t *) (idx + k.y*nb10 + k.z*nb11 + k.w*nb12);

    float lo[4];
    float hi[4];
    ggml_cuda_rq_decode<code>((const typename code::block *) (src + row*nb01 + k.z*nb02 + k.w*nb03) + k.x, w, lo, hi);

    float * y = (float *) (dst + d.at(i));
    ggml_cuda_rq_write4(y + 4*w,                  lo);
    ggml_cuda_rq_write4(y + 4*w + code::values/2, hi);
}

// blocks -> blocks of the same type
template <typename code>
static __global__ void ggml_cuda_rq_copy_kernel(
        const char * src, char * dst, const int64_t n, const ggml_cuda_rq_rows s, const ggml_cuda_rq_rows d) {
    const int64_t i = ggml_cuda_rq_unit();
    if (i >= n) {
        return;
    }
    ggml_cuda_pdl_sync();
    const uint16_t * x = (const uint16_t *) (src + s.at(i));
    uint16_t       * y = (uint16_t       *) (dst + d.at(i));
    for (int k = threadIdx.x; k < (int) sizeof(typename code::block)/2; k += 32) {
        y[k] = x[k];
    }
}

// K or V of an attention in f16 with its recent rows (ggml-rq-types.h) behind: dst is [D, heads, rows, sequences] and contiguous. What
// is written begins at row first: rows of the cache where that is f16 (elsewhere they have been converted), those that were held,
// those of this batch, which are f32, and zeros.
struct ggml_cuda_rq_gather {
    half       * dst;
    const char * src[3];
    int64_t      nb[3][3]; // from row to row, head, sequence
    int          end[3];   // rows of dst up to the end of each
    int          first;
    int          rows;
    int          D;
    uint3        heads;    // for fast_div_modulo
    uint3        written;  // rows
};

static __global__ void ggml_cuda_rq_gather_kernel(const ggml_cuda_rq_gather a, const int64_t n) {
    const int64_t i = ggml_cuda_rq_unit();
    if (i >= n) {
        return;
    }
    const uint2 h   = fast_div_modulo(i, a.heads);
    const uint2 r   = fast_div_modulo(h.x, a.written);
    const int   row = a.first + r.y;
    const int   s   = row < a.end[0] ? 0 : row < a.end[1] ? 1 : row < a.end[2] ? 2 : 3;

    half       * dst = a.dst + (((int64_t) r.x*a.rows + row)*a.heads.z + h.y)*a.D;
    const char * src = s == 3 ? nullptr : a.src[s] + (row - (s == 0 ? 0 : a.end[s - 1]))*a.nb[s][0] + h.y*a.nb[s][1] + r.x*a.nb[s][2];

    ggml_cuda_pdl_sync();
    for (int k = 2*threadIdx.x; k < a.D; k += 2*WARP_SIZE) {
        half2 v = make_half2(0.0f, 0.0f);
        if (s < 2) {
            v = *(const half2 *) (src + k*sizeof(half));
        } else if (s == 2) {
            const float * x = (const float *) src + k;
            v = make_half2(__float2half_rn(x[0]), __float2half_rn(x[1]));
        }
        *(half2 *) (dst + k) = v;
    }
}

// Rotates contiguous rows of n values and then writes them (dst), stores them as blocks (cache), or both. dst and cache may be null.
struct ggml_cuda_rq_job {
    const float * src;
    float       * dst;
    int64_t       rows;
    int           family;
    int           mode;
    char        * cache;
    const char  * idx;      // rows of the cache
    int64_t       nb_cache; // bytes from row to row
    int64_t       nb_idx;
    uint3         units;    // blocks of a row of the cache, for fast_div_modulo
    int           bits;
    int           block;    // values of one
    bool          wide;     // indices of 64 bits
};

template <int n>
static __device__ __forceinline__ void ggml_cuda_rq_rotate(float (&v)[ggml_cuda_rq_held(n)], const int family, const int mode, const int lane) {
    switch (family) {
        case GGML_RQ_PLANAR: ggml_cuda_rq_rotate<n, GGML_RQ_PLANAR>(v, mode, lane); break;
        case GGML_RQ_ISO:    ggml_cuda_rq_rotate<n, GGML_RQ_ISO   >(v, mode, lane); break;
        default:             ggml_cuda_rq_rotate<n, GGML_RQ_ROTOR >(v, mode, lane); break;
    }
}

#define GGML_CUDA_RQ_MAX_JOBS 3

struct ggml_cuda_rq_jobs {
    ggml_cuda_rq_job job[GGML_CUDA_RQ_MAX_JOBS];
    int              n;
    int              scale_kind;
};

// block i, of all that the job stores: v[k] of the lane is its value 4*lane + k
template <typename code>
static __device__ __forceinline__ void ggml_cuda_rq_store_block(
        const float (&v)[4], const ggml_cuda_rq_job & job, const int64_t i, const int scale_kind, const bool valid) {
    const uint2   unit = fast_div_modulo(valid ? i : 0, job.units);
    const char  * at   = job.idx + unit.x*job.nb_idx;
    char        * to   = job.cache + (job.wide ? *(const int64_t *) at : *(const int32_t *) at)*job.nb_cache;
    ggml_cuda_rq_quantize_lanes<code>(v, (typename code::block *) to + unit.y, threadIdx.x % (code::values/4), scale_kind, valid);
}

template <int N>
static __device__ __forceinline__ void ggml_cuda_rq_store_block(
        const float (&v)[4], const ggml_cuda_rq_job & job, const int64_t i, const int scale_kind, const bool valid) {
    switch (job.bits) {
        case 2:  ggml_cuda_rq_store_block<ggml_cuda_rq_code<2, N>>(v, job, i, scale_kind, valid); break;
        case 3:  ggml_cuda_rq_store_block<ggml_cuda_rq_code<3, N>>(v, job, i, scale_kind, valid); break;
        default: ggml_cuda_rq_store_block<ggml_cuda_rq_code<4, N>>(v, job, i, scale_kind, valid); break; // the host has refused others
    }
}

// warps that a job takes
template <int n>
static __host__ __device__ int64_t ggml_cuda_rq_warps(const int64_t rows) {
    return (rows*ggml_cuda_rq_lanes(n) + WARP_SIZE - 1)/WARP_SIZE;
}

// by warp i of those that rotate
template <int n>
static __device__ __forceinline__ void ggml_cuda_rq_rotate_rows(const ggml_cuda_rq_jobs & jobs, int64_t i) {
    constexpr int lanes = ggml_cuda_rq_lanes(n);

    int k = 0;
    while (k < jobs.n && i >= ggml_cuda_rq_warps<n>(jobs.job[k].rows)) {
        i -= ggml_cuda_rq_warps<n>(jobs.job[k++].rows);
    }
    if (k == jobs.n) {
        return;
    }
    const ggml_cuda_rq_job job = jobs.job[k];
    const int     lane  = threadIdx.x % lanes;
    const int64_t row   = i*(WARP_SIZE/lanes) + threadIdx.x/lanes;
    const bool    valid = row < job.rows; // all of a warp are needed
    const float * x     = job.src + row*n;

    ggml_cuda_pdl_sync();
    float v[ggml_cuda_rq_held(n)];
#pragma unroll
    for (int j = 0; j < ggml_cuda_rq_held(n); ++j) {
        v[j] = valid ? x[j/4*128 + 4*lane + j%4] : 0.0f;
    }
    ggml_cuda_rq_rotate<n>(v, job.family, job.mode, lane);
    ggml_cuda_pdl_lc();
    if (job.dst && valid) {
        float * y = job.dst + row*n;
#pragma unroll
        for (int j = 0; j < ggml_cuda_rq_held(n); ++j) {
            y[j/4*128 + 4*lane + j%4] = v[j];
        }
    }
    if (job.cache) {
        if constexpr (n < 128) {
            if (job.block == 64) {
                ggml_cuda_rq_store_block<64>(v, job, row, jobs.scale_kind, valid);
            } else { // heads of 128 beside smaller ones: two rows are a block, and there are no odd ones
                ggml_cuda_rq_store_block<128>(v, job, i, jobs.scale_kind, valid);
            }
        } else {
#pragma unroll
            for (int h = 0; h < n/128; ++h) {
                ggml_cuda_rq_store_block<128>({ v[4*h], v[4*h + 1], v[4*h + 2], v[4*h + 3] }, job, row*(n/128) + h, jobs.scale_kind, valid);
            }
        }
    }
}

template <int n>
static __global__ void ggml_cuda_rq_rotate_kernel(const ggml_cuda_rq_jobs jobs) {
    ggml_cuda_rq_rotate_rows<n>(jobs, ggml_cuda_rq_unit());
}

// Multiplies heads by the matrix of their KV head [n, n], the mean taken off before, and writes them, stores them as blocks of the
// cache, or both. A CUDA block takes a few rows of a KV head: each thread outputs of its own, for all of them.
#define GGML_CUDA_RQ_MAP_ROWS GGML_CUDA_RQ_WARPS

struct ggml_cuda_rq_map {
    const char     * map;
    const float    * mean;      // [n, heads], or nullptr
    const float    * src;
    float          * dst;       // nullptr where the result is only stored
    int64_t          nb_src[3]; // values from token to token, within a group, from KV head to KV head
    int64_t          nb_dst[3];
    ggml_cuda_rq_job store;     // where to, of which the rest is not used
    uint3            group;     // heads of a KV head, for fast_div_modulo
    uint3            tiles;     // CUDA blocks of a KV head
    int              rows;      // of a KV head: tokens times group
    int              heads;     // KV heads
    int              n;
    bool             is_f16;
};

struct ggml_cuda_rq_maps {
    ggml_cuda_rq_map map[GGML_CUDA_RQ_MAX_JOBS];
    int              n;
};

static __host__ __device__ int ggml_cuda_rq_map_nb_shared(const int n) {
    return 2*GGML_CUDA_RQ_MAP_ROWS*n*(int) sizeof(float);
}

// y[r] = the product of row w of a matrix with row r of x
template <typename T>
static __device__ __forceinline__ void ggml_cuda_rq_map_products(const T * w, const float * x, const int n, float (&y)[GGML_CUDA_RQ_MAP_ROWS]) {
#pragma unroll 2
    for (int i = 0; i < n; i += 8) {
        __align__(16) T     a[8];
        __align__(16) float b[4];
#pragma unroll
        for (int k = 0; k < 8*(int) sizeof(T)/16; ++k) {
            ggml_cuda_memcpy_1<16>((char *) a + 16*k, (const char *) (w + i) + 16*k);
        }
#pragma unroll
        for (int r = 0; r < GGML_CUDA_RQ_MAP_ROWS; ++r) {
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                if (k % 4 == 0) {
                    ggml_cuda_memcpy_1<16>(b, x + r*n + i + k);
                }
                if constexpr (sizeof(T) == sizeof(float)) {
                    y[r] += a[k]*b[k%4];
                } else {
                    y[r] += __half2float(a[k])*b[k%4];
                }
            }
        }
    }
}

// by CUDA block b of those of m
static __device__ __forceinline__ void ggml_cuda_rq_map_rows(const ggml_cuda_rq_map & m, const uint32_t b, const int scale_kind) {
    extern __shared__ uint4 ggml_cuda_rq_map_shared[];

    const int     n    = m.n;
    const uint2   at   = fast_div_modulo(b, m.tiles);
    const int64_t head = at.x;
    const int     row0 = at.y*GGML_CUDA_RQ_MAP_ROWS;
    const int     tid  = threadIdx.y*WARP_SIZE + threadIdx.x;
    float * x = (float *) ggml_cuda_rq_map_shared;
    float * y = x + GGML_CUDA_RQ_MAP_ROWS*n;

    ggml_cuda_pdl_sync();
    for (int r = 0; r < GGML_CUDA_RQ_MAP_ROWS; ++r) {
        const bool    valid = row0 + r < m.rows;
        const uint2   row   = fast_div_modulo(valid ? row0 + r : 0, m.group); // token and head of the group
        const float * src   = m.src + row.x*m.nb_src[0] + row.y*m.nb_src[1] + head*m.nb_src[2];
        for (int i = tid; i < n; i += GGML_CUDA_RQ_WARPS*WARP_SIZE) {
            x[r*n + i] = valid ? src[i] - (m.mean ? m.mean[head*n + i] : 0.0f) : 0.0f;
        }
    }
    __syncthreads();
    for (int j = tid; j < n; j += GGML_CUDA_RQ_WARPS*WARP_SIZE) {
        float v[GGML_CUDA_RQ_MAP_ROWS] = { 0.0f };
        if (m.is_f16) {
            ggml_cuda_rq_map_products((const half  *) m.map + (head*n + j)*n, x, n, v);
        } else {
            ggml_cuda_rq_map_products((const float *) m.map + (head*n + j)*n, x, n, v);
        }
#pragma unroll
        for (int r = 0; r < GGML_CUDA_RQ_MAP_ROWS; ++r) {
            y[r*n + j] = v[r];
        }
    }
    __syncthreads();
    ggml_cuda_pdl_lc();

    // a row for each warp
    const bool    valid = row0 + (int) threadIdx.y < m.rows;
    const uint2   row   = fast_div_modulo(valid ? row0 + threadIdx.y : 0, m.group);
    const int     lane  = threadIdx.x;
    y += threadIdx.y*n;
    if (m.dst && valid) {
        float * dst = m.dst + row.x*m.nb_dst[0] + row.y*m.nb_dst[1] + head*m.nb_dst[2];
        for (int i = lane; i < n; i += WARP_SIZE) {
            dst[i] = y[i];
        }
    }
    if (m.store.cache) {
        const int64_t first = ((int64_t) row.x*m.heads + head)*(n/m.store.block); // block of all
        if (m.store.block == QK_RQ) {
            for (int u = 0; u < n/QK_RQ; ++u) {
                const float * v = y + QK_RQ*u + 4*lane;
                ggml_cuda_rq_store_block<QK_RQ>({ v[0], v[1], v[2], v[3] }, m.store, first + u, scale_kind, valid);
            }
        } else {
            for (int u0 = 0; u0 < n/QK_RQ_64; u0 += 2) {
                const int     u     = u0 + lane/16;
                const bool    there = u < n/QK_RQ_64;
                const float * v     = y + (there ? QK_RQ_64*u : 0) + 4*(lane%16);
                ggml_cuda_rq_store_block<QK_RQ_64>({ v[0], v[1], v[2], v[3] }, m.store, first + u, scale_kind, valid && there);
            }
        }
    }
}

// products with the matrices of a profile, and rotations of n values, in one launch
template <int n>
static __global__ void ggml_cuda_rq_turn_kernel(const ggml_cuda_rq_maps maps, const ggml_cuda_rq_jobs jobs) {
    uint32_t b = blockIdx.x;
    for (int k = 0; k < maps.n; ++k) {
        const uint32_t blocks = maps.map[k].tiles.z*maps.map[k].heads;
        if (b < blocks) {
            ggml_cuda_rq_map_rows(maps.map[k], b, jobs.scale_kind);
            return;
        }
        b -= blocks;
    }
    ggml_cuda_rq_rotate_rows<n>(jobs, (int64_t) b*GGML_CUDA_RQ_WARPS + threadIdx.y);
}

// Into how many parts the rows of K and V are split, a CUDA block each, for every tile of columns: as many as use at least 19 in
// 20 of the places that the card has for CUDA blocks at once, in the fewest rounds. No part has less than one pass of rows.
static int ggml_cuda_rq_parts(const int64_t tiles, const int64_t places, const int64_t passes) {
    int64_t best = 1;
    double  used = 0.0;
    for (int64_t round = 1; round <= 8; ++round) {
        const int64_t parts = std::min(std::max<int64_t>(round*places/tiles, 1), passes);
        const int64_t needs = (tiles*parts + places - 1)/places; // rounds
        const double  now   = (double) (tiles*parts)/(double) (needs*places);
        if (now > used) {
            used = now;
            best = parts;
        }
        if (used >= 0.95 || parts == passes) {
            break;
        }
    }
    return (int) best;
}

// Puts the parts together that CUDA blocks have made of a row of attention, each with its maximum and sum in meta, and rotates
// each n values of it: family < 0 for no rotation. parts: [units*n, n_parts, rows]; a single part is divided already and has no
// meta.
template <int n>
static __global__ void ggml_cuda_rq_combine_kernel(
        const float * parts, const float2 * meta, float * dst, const int64_t rows, const uint3 units, const int n_parts, const int family, const int mode) {
    constexpr int lanes = ggml_cuda_rq_lanes(n);

    const int64_t i     = ggml_cuda_rq_unit_of_lanes<lanes>();
    const bool    valid = i < rows*units.z; // all of a warp are needed
    const uint2   at    = fast_div_modulo(valid ? i : 0, units);
    const int64_t row   = at.x;
    const int     lane  = threadIdx.x % lanes;
    const int64_t D     = (int64_t) units.z*n;
    parts += row*n_parts*D + at.y*n;
    meta  += row*n_parts;

    ggml_cuda_pdl_sync();
    float max = -FLT_MAX;
    for (int p = lane; p < n_parts && n_parts > 1; p += lanes) {
        max = fmaxf(max, meta[p].x);
    }
#pragma unroll
    for (int offset = lanes/2; offset > 0; offset >>= 1) {
        max = fmaxf(max, __shfl_xor_sync(0xFFFFFFFF, max, offset, WARP_SIZE));
    }

    float v[ggml_cuda_rq_held(n)] = { 0.0f };
    float sum = 0.0f; // of this lane's parts
    for (int p0 = 0; p0 < n_parts; p0 += lanes) {
        float own = 1.0f; // what part p0 + lane counts
        if (n_parts > 1) {
            const float2 m = p0 + lane < n_parts ? meta[p0 + lane] : make_float2(-INFINITY, 0.0f);
            own  = expf(m.x - max);
            sum += own*m.y;
        }
#pragma unroll 4
        for (int p = 0; p < lanes && p0 + p < n_parts; ++p) {
            const float   f = __shfl_sync(0xFFFFFFFF, own, p, lanes);
            const float * x = parts + (p0 + p)*D;
#pragma unroll
            for (int j = 0; j < ggml_cuda_rq_held(n); ++j) {
                v[j] += f*x[j/4*128 + 4*lane + j%4];
            }
        }
    }
    if (n_parts > 1) {
#pragma unroll
        for (int offset = lanes/2; offset > 0; offset >>= 1) {
            sum += __shfl_xor_sync(0xFFFFFFFF, sum, offset, WARP_SIZE);
        }
    } else {
        sum = 1.0f;
    }
#pragma unroll
    for (int j = 0; j < ggml_cuda_rq_held(n); ++j) {
        v[j] /= sum;
    }
    if (family >= 0) {
        ggml_cuda_rq_rotate<n>(v, family, mode, lane);
    }
    ggml_cuda_pdl_lc();
    dst += row*D + at.y*n;
#pragma unroll
    for (int j = 0; j < ggml_cuda_rq_held(n); ++j) {
        if (valid) {
            dst[j/4*128 + 4*lane + j%4] = v[j];
        }
    }
}

// What belongs to the queries of an attention
struct ggml_cuda_rq_queries {
    const char * q;
    int64_t  nb[3]; // from query to query, head, sequence
    uint3    heads; // for fast_div_modulo
    uint3    n;
    uint3    group; // heads of a head of K and V
    float    scale, softcap, max_bias, m0, m1;
    uint32_t n_head_log2;
};

// two values of a row of f16 or f32
static __device__ __forceinline__ float2 ggml_cuda_rq_read2(const char * x, const bool is_f16, const int i) {
    if (is_f16) {
        const half2 h = *(const half2 *) (x + i*sizeof(half));
        return make_float2(__half2float(h.x), __half2float(h.y));
    }
    const float * f = (const float *) x + i; // rounded, as those that were held
    return make_float2(__half2float(__float2half_rn(f[0])), __half2float(__float2half_rn(f[1])));
}

// The same for parts of the rows of the cache alone, without a rotation: a warp attends to the recent rows, too, four at a time, where there is
// no kernel of ours with parts of them (cards without int8 tensor cores). Slower than parts where they are many. At least two parts.
template <int n>
static __global__ void ggml_cuda_rq_combine_recent_kernel(
        const float * parts, const float2 * meta, float * dst, const int64_t rows, const int n_parts,
        const ggml_cuda_rq_queries queries, const ggml_cuda_rq_recent recent) {
    const int64_t row = ggml_cuda_rq_unit();
    if (row >= rows) {
        return;
    }
    const int   lane    = threadIdx.x;
    const uint2 by_head = fast_div_modulo(row, queries.heads);
    const uint2 at      = fast_div_modulo(by_head.x, queries.n); // sequence, query
    const int   head    = by_head.y;
    const int   head_kv = fast_div_modulo(head, queries.group).x;
    parts += row*n_parts*n;
    meta  += row*n_parts;

    // values 64*j + 2*lane and the next
    ggml_cuda_pdl_sync();
    float2 v[n/64];
    float2 q[n/64];
    const float * x = (const float *) (queries.q + at.y*queries.nb[0] + head*queries.nb[1] + at.x*queries.nb[2]);
#pragma unroll
    for (int j = 0; j < n/64; ++j) {
        v[j] = make_float2(0.0f, 0.0f);
        q[j] = make_float2(queries.scale*x[64*j + 2*lane], queries.scale*x[64*j + 2*lane + 1]);
    }
    float max = -FLT_MAX;
    for (int i = 0; i < n_parts; ++i) {
        max = fmaxf(max, meta[i].x);
    }
    float sum = 0.0f;
    for (int i = 0; i < n_parts; ++i) {
        const float f = expf(meta[i].x - max);
        sum += f*meta[i].y;
#pragma unroll
        for (int j = 0; j < n/64; ++j) {
            v[j].x += f*parts[(int64_t) i*n + 64*j + 2*lane];
            v[j].y += f*parts[(int64_t) i*n + 64*j + 2*lane + 1];
        }
    }

    const float  slope = get_alibi_slope(queries.max_bias, head, queries.n_head_log2, queries.m0, queries.m1);
    const half * mask  = (const half *) (recent.mask + (int64_t) at.y*recent.nb_mask + at.x*recent.nb_mask3);
    const auto   place = [&](const char * held, const int64_t * nb_held, const char * fresh, const int64_t * nb_fresh, const int r) {
        return r < recent.n_held ? held + r*nb_held[0] + head_kv*nb_held[1] + at.x*nb_held[2] :
            fresh + (r - recent.n_held)*nb_fresh[0] + head_kv*nb_fresh[1] + at.x*nb_fresh[2];
    };
    for (int r0 = 0; r0 < recent.n; r0 += 4) {
        float s[4];
        float top = max;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int   r      = r0 + i;
            const float hidden = r < recent.n ? __half2float(mask[r]) : -INFINITY;
            s[i] = -INFINITY;
            if (hidden > -FLT_MAX) { // for all lanes alike
                const char * k = place(recent.k, recent.nb_k, recent.k_new, recent.nb_k_new, r);
                s[i] = 0.0f;
#pragma unroll
                for (int j = 0; j < n/64; ++j) {
                    const float2 y = ggml_cuda_rq_read2(k, r < recent.n_held, 64*j + 2*lane);
                    s[i] += q[j].x*y.x + q[j].y*y.y;
                }
                s[i] = warp_reduce_sum(s[i]);
                s[i] = (queries.softcap == 0.0f ? s[i] : queries.softcap*tanhf(s[i])) + slope*hidden;
            }
            top = fmaxf(top, s[i]);
        }
        const float f = expf(max - top);
        max  = top;
        sum *= f;
#pragma unroll
        for (int j = 0; j < n/64; ++j) {
            v[j].x *= f;
            v[j].y *= f;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int   r = r0 + i;
            const float p = expf(s[i] - max);
            sum += p;
            if (p > 0.0f) {
                const char * from = place(recent.v, recent.nb_v, recent.v_new, recent.nb_v_new, r);
#pragma unroll
                for (int j = 0; j < n/64; ++j) {
                    const float2 y = ggml_cuda_rq_read2(from, r < recent.n_held, 64*j + 2*lane);
                    v[j].x += p*y.x;
                    v[j].y += p*y.y;
                }
            }
        }
    }
    ggml_cuda_pdl_lc();
    dst += row*n;
#pragma unroll
    for (int j = 0; j < n/64; ++j) {
        dst[64*j + 2*lane]     = v[j].x/sum;
        dst[64*j + 2*lane + 1] = v[j].y/sum;
    }
}
