#pragma once

// What a lane of upstream's vector attention kernel (fattn-vec.cuh) does with a row of our types.

#include "rq-device.cuh"

// This lane's share of the product of a row of K with a query in q8_1, of which lane t of nthreads holds the words (of four
// values) t + nthreads*i as Q_q8[i] and their scales as Q_ds[i].x.
template <typename code, int D, int nthreads>
static __device__ __forceinline__ float ggml_cuda_rq_vec_dot(const char * K, const int * Q_q8, const float2 * Q_ds, const int t) {
    typedef typename code::block block;
    constexpr int n = code::values/8; // words of a block, each with four values of its lower and four of its upper half

    float sum = 0.0f;
#pragma unroll
    for (int b = 0; b < D/code::values; ++b) {
        const block * x = (const block *) K + b;
        float part = 0.0f;
#pragma unroll
        for (int i = 0; i < (nthreads < n ? n/nthreads : 1); ++i) {
            int c[2];
            ggml_cuda_rq_centroids<code>(x, (t + nthreads*i) % n, c[0], c[1]);
            if (nthreads == 2*n) { // the other half of a word is another lane's
                part += (float) ggml_cuda_dp4a(t < n ? c[0] : c[1], Q_q8[b], 0)*Q_ds[b].x;
            } else {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int j = (2*n*b + n*h)/nthreads + i;
                    part += (float) ggml_cuda_dp4a(c[h], Q_q8[j], 0)*Q_ds[j].x;
                }
            }
        }
        sum += __half2float(x->d)*part;
    }
    return sum*(1.0f/128.0f);
}

// values i0 to i0 + 3 of a row of V; 4 divides i0
template <typename code, typename T>
static __device__ __forceinline__ void ggml_cuda_rq_vec_dequantize(const void * V, const int64_t i0, T * dst) {
    const auto * x = (const typename code::block *) V + i0/code::values;
    const int    i = i0 % code::values;

    int c[2];
    ggml_cuda_rq_centroids<code>(x, i/4 % (code::values/8), c[0], c[1]);
    float v[4];
    ggml_cuda_rq_values(i < code::values/2 ? c[0] : c[1], __half2float(x->d)*(1.0f/128.0f), v);
    ggml_cuda_rq_write4(dst, v);
}
