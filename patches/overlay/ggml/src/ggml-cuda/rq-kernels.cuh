#pragma once

// Kernels that store, read and copy blocks of the rq cache types and that rotate rows. A warp takes a block or a row.

#include "rq-device.cuh"

#include <algorithm>

#define GGML_CUDA_RQ_WARPS 4 // of a CUDA block

// Where the rows of a tensor lie: ne in units of 128 values, as upstream's fast division takes them, nb in bytes. Plain divisions,
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

// F32 -> blocks, each row to where idx says
template <int bits, typename idx_t>
static __global__ void ggml_cuda_rq_set_rows_kernel(
        const char * src, const char * idx, char * dst, const int64_t n, const ggml_cuda_rq_rows s,
        const uint3 ne11, const uint3 ne12, const int64_t nb10, const int64_t nb11, const int64_t nb12,
        const int64_t nb1, const int64_t nb2, const int64_t nb3, const int scale_kind) {
    const int64_t i = ggml_cuda_rq_unit();
    if (i >= n) {
        return;
    }
    const uint4 k = s.split(i);

    ggml_cuda_pdl_sync();
    const int64_t row = *(const idx_t *) (idx + k.y*nb10 + fast_div_modulo(k.z, ne11).y*nb11 + fast_div_modulo(k.w, ne12).y*nb12);

    typedef typename ggml_cuda_rq_code<bits>::block block;
    ggml_cuda_rq_quantize<bits>((const float *) (src + s.at(i)), (block *) (dst + row*nb1 + k.z*nb2 + k.w*nb3) + k.x, threadIdx.x, scale_kind);
}

// F32 -> blocks
template <int bits>
static __global__ void ggml_cuda_rq_quantize_kernel(
        const char * src, char * dst, const int64_t n, const ggml_cuda_rq_rows s, const ggml_cuda_rq_rows d, const int scale_kind) {
    const int64_t i = ggml_cuda_rq_unit();
    if (i >= n) {
        return;
    }
    ggml_cuda_pdl_sync();
    ggml_cuda_rq_quantize<bits>((const float *) (src + s.at(i)), (typename ggml_cuda_rq_code<bits>::block *) (dst + d.at(i)), threadIdx.x, scale_kind);
}

// blocks -> F32 or F16; sixteen lanes take a block, so that a warp takes two
template <int bits, typename T>
static __global__ void ggml_cuda_rq_dequantize_kernel(
        const char * src, char * dst, const int64_t n, const ggml_cuda_rq_rows s, const ggml_cuda_rq_rows d) {
    const int64_t i = 2*ggml_cuda_rq_unit() + threadIdx.x/16;
    if (i >= n) {
        return;
    }
    const int w = threadIdx.x % 16;

    ggml_cuda_pdl_sync();
    float lo[4];
    float hi[4];
    ggml_cuda_rq_decode<bits>((const typename ggml_cuda_rq_code<bits>::block *) (src + s.at(i)), w, lo, hi);

    T * y = (T *) (dst + d.at(i));
    ggml_cuda_rq_write4(y + 4*w,      lo);
    ggml_cuda_rq_write4(y + 4*w + 64, hi);
}

// the rows of blocks that idx names -> F32; d has the shape of idx with a row of blocks before it
template <int bits>
static __global__ void ggml_cuda_rq_get_rows_kernel(
        const char * src, const char * idx, char * dst, const int64_t n, const ggml_cuda_rq_rows d,
        const int64_t nb10, const int64_t nb11, const int64_t nb12, const int64_t nb01, const int64_t nb02, const int64_t nb03) {
    const int64_t i = 2*ggml_cuda_rq_unit() + threadIdx.x/16;
    if (i >= n) {
        return;
    }
    const int   w = threadIdx.x % 16;
    const uint4 k = d.split(i);

    ggml_cuda_pdl_sync();
    const int64_t row = *(const int32_t *) (idx + k.y*nb10 + k.z*nb11 + k.w*nb12);

    float lo[4];
    float hi[4];
    ggml_cuda_rq_decode<bits>((const typename ggml_cuda_rq_code<bits>::block *) (src + row*nb01 + k.z*nb02 + k.w*nb03) + k.x, w, lo, hi);

    float * y = (float *) (dst + d.at(i));
    ggml_cuda_rq_write4(y + 4*w,      lo);
    ggml_cuda_rq_write4(y + 4*w + 64, hi);
}

// blocks -> blocks of the same type
template <int bits>
static __global__ void ggml_cuda_rq_copy_kernel(
        const char * src, char * dst, const int64_t n, const ggml_cuda_rq_rows s, const ggml_cuda_rq_rows d) {
    const int64_t i = ggml_cuda_rq_unit();
    if (i >= n) {
        return;
    }
    ggml_cuda_pdl_sync();
    const uint16_t * x = (const uint16_t *) (src + s.at(i));
    uint16_t       * y = (uint16_t       *) (dst + d.at(i));
    for (int k = threadIdx.x; k < (int) sizeof(typename ggml_cuda_rq_code<bits>::block)/2; k += 32) {
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
    uint3         units;    // of 128 values in a row of the cache, for fast_div_modulo
    int           bits;
    bool          wide;     // indices of 64 bits
};

template <int n>
static __device__ __forceinline__ void ggml_cuda_rq_rotate(float (&v)[n/32], const int family, const int mode, const int lane) {
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

template <int n, int bits>
static __device__ __forceinline__ void ggml_cuda_rq_store_row(const float (&v)[n/32], char * row, const uint32_t unit, const int lane, const int scale_kind) {
#pragma unroll
    for (int h = 0; h < n/128; ++h) {
        ggml_cuda_rq_quantize_lanes<bits>({ v[4*h], v[4*h + 1], v[4*h + 2], v[4*h + 3] },
            (typename ggml_cuda_rq_code<bits>::block *) row + unit + h, lane, scale_kind);
    }
}

template <int n>
static __global__ void ggml_cuda_rq_rotate_kernel(const ggml_cuda_rq_jobs jobs) {
    int64_t row = ggml_cuda_rq_unit();
    int     k   = 0;
    while (k < jobs.n && row >= jobs.job[k].rows) {
        row -= jobs.job[k++].rows;
    }
    if (k == jobs.n) {
        return;
    }
    const ggml_cuda_rq_job job = jobs.job[k];
    const int lane = threadIdx.x;
    const float * x = job.src + row*n;

    ggml_cuda_pdl_sync();
    float v[n/32];
#pragma unroll
    for (int j = 0; j < n/32; ++j) {
        v[j] = x[j/4*128 + 4*lane + j%4];
    }
    ggml_cuda_rq_rotate<n>(v, job.family, job.mode, lane);
    ggml_cuda_pdl_lc();
    if (job.dst) {
        float * y = job.dst + row*n;
#pragma unroll
        for (int j = 0; j < n/32; ++j) {
            y[j/4*128 + 4*lane + j%4] = v[j];
        }
    }
    if (job.cache) {
        const uint2   unit = fast_div_modulo(row*(n/128), job.units);
        const char  * at   = job.idx + unit.x*job.nb_idx;
        char        * to   = job.cache + (job.wide ? *(const int64_t *) at : *(const int32_t *) at)*job.nb_cache;
        switch (job.bits) {
            case 2:  ggml_cuda_rq_store_row<n, 2>(v, to, unit.y, lane, jobs.scale_kind); break;
            case 3:  ggml_cuda_rq_store_row<n, 3>(v, to, unit.y, lane, jobs.scale_kind); break;
            default: ggml_cuda_rq_store_row<n, 4>(v, to, unit.y, lane, jobs.scale_kind); break;
        }
    }
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
// it: family < 0 for no rotation. parts: [n, n_parts, rows]; a single part is divided already and has no meta.
template <int n>
static __global__ void ggml_cuda_rq_combine_kernel(
        const float * parts, const float2 * meta, float * dst, const int64_t rows, const int n_parts, const int family, const int mode) {
    const int64_t row = ggml_cuda_rq_unit();
    if (row >= rows) {
        return;
    }
    const int lane = threadIdx.x;
    parts += row*n_parts*n;
    meta  += row*n_parts;

    ggml_cuda_pdl_sync();
    float max = -FLT_MAX;
    for (int i = lane; i < n_parts && n_parts > 1; i += WARP_SIZE) {
        max = fmaxf(max, meta[i].x);
    }
    max = warp_reduce_max(max);

    float v[n/32] = { 0.0f };
    float sum     = 0.0f; // of this lane's parts
    for (int i0 = 0; i0 < n_parts; i0 += WARP_SIZE) {
        float own = 1.0f; // what part i0 + lane counts
        if (n_parts > 1) {
            const float2 m = i0 + lane < n_parts ? meta[i0 + lane] : make_float2(-INFINITY, 0.0f);
            own  = expf(m.x - max);
            sum += own*m.y;
        }
#pragma unroll 4
        for (int i = 0; i < WARP_SIZE && i0 + i < n_parts; ++i) {
            const float   f = __shfl_sync(0xFFFFFFFF, own, i, WARP_SIZE);
            const float * x = parts + (int64_t) (i0 + i)*n;
#pragma unroll
            for (int j = 0; j < n/32; ++j) {
                v[j] += f*x[j/4*128 + 4*lane + j%4];
            }
        }
    }
    sum = n_parts > 1 ? warp_reduce_sum(sum) : 1.0f;
#pragma unroll
    for (int j = 0; j < n/32; ++j) {
        v[j] /= sum;
    }
    if (family >= 0) {
        ggml_cuda_rq_rotate<n>(v, family, mode, lane);
    }
    ggml_cuda_pdl_lc();
    dst += row*n;
#pragma unroll
    for (int j = 0; j < n/32; ++j) {
        dst[j/4*128 + 4*lane + j%4] = v[j];
    }
}
