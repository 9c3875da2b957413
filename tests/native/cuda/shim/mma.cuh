// stand-in for llama.cpp's mma.cuh: fragments and products as the PTX manual lays them out (mma.m16n8k32 of s8,
// mma.m16n8k16 of f16, movmatrix)
#pragma once

#include "common.cuh"

namespace ggml_cuda_mma {

template <int I, int J, typename T>
struct tile {
    T x[I*J/32] = {};
};

struct fragments {
    uint32_t a[4];
    uint32_t b[2];
};

template <typename A, typename B>
static inline void gather(const A & a, const B & b, fragments (&all)[32]) {
    fragments own;
    memcpy(own.a, a.x, sizeof(own.a));
    memcpy(own.b, b.x, sizeof(own.b));
    emulator::meet_warp(own, all);
}

// c: rows lane/4 and lane/4 + 8, columns 2*(lane%4) and the next
template <typename C, typename F>
static inline void add_products(C & c, int n_k, const F & product) {
    const int lane = emulator::current % 32;
    for (int l = 0; l < 4; l++) {
        for (int k = 0; k < n_k; k++) {
            c.x[l] += product(lane/4 + 8*(l/2), 2*(lane % 4) + l % 2, k);
        }
    }
}

static inline void mma(tile<16, 8, int> & c, const tile<16, 8, int> & a, const tile<8, 8, int> & b) {
    fragments all[32];
    gather(a, b, all);
    add_products(c, 32, [&](int row, int col, int k) {
        const int8_t va = (int8_t) (all[row % 8*4 + k % 16/4].a[row/8 + k/16*2] >> 8*(k % 4));
        const int8_t vb = (int8_t) (all[col*4 + k % 16/4].b[k/16] >> 8*(k % 4));
        return va*vb;
    });
}

static inline float half_at(uint32_t pair, int i) {
    return __half2float({ (uint16_t) (pair >> 16*i) });
}

static inline void mma(tile<16, 8, float> & c, const tile<16, 8, half2> & a, const tile<8, 8, half2> & b) {
    fragments all[32];
    gather(a, b, all);
    add_products(c, 16, [&](int row, int col, int k) {
        return half_at(all[row % 8*4 + k % 8/2].a[row/8 + k/8*2], k % 2) * half_at(all[col*4 + k % 8/2].b[k/8], k % 2);
    });
}

} // namespace ggml_cuda_mma

// transposes 8x8 halves; a lane holds two of row lane/4
static inline int ggml_cuda_movmatrix(int v) {
    int all[32];
    emulator::meet_warp(v, all);
    const int lane = emulator::current % 32;
    const auto at = [&](int row, int col) { return (uint32_t) all[row*4 + col/2] >> 16*(col % 2) & 0xFFFF; };
    return (int) (at(2*(lane % 4), lane/4) | at(2*(lane % 4) + 1, lane/4) << 16);
}

static inline half2 ggml_cuda_movmatrix(half2 v) {
    int bits;
    memcpy(&bits, &v, sizeof(bits));
    bits = ggml_cuda_movmatrix(bits);
    memcpy(&v, &bits, sizeof(v));
    return v;
}
