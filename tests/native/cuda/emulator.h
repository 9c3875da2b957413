// Runs CUDA kernels as C++: every thread of a CUDA block is a fiber, and whatever threads do together (barriers, shuffles,
// matrix products of a warp) is a meeting at which each leaves its part. One block after the other; slow and plain.
// A warp runs on until it has to wait for another, so that one that does not wait where it should is as far ahead as it can be.
// What the emulator cannot tell: races in any other order, and how fast anything is.
#pragma once

#include <cfloat>
#include <climits>
#include <cmath>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <ucontext.h>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint2 { uint32_t x, y; };
struct uint3 { uint32_t x, y, z; };
struct dim3  { uint32_t x, y, z; };
struct uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };

static inline uint4  make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return { x, y, z, w }; }
static inline float2 make_float2(float x, float y) { return { x, y }; }

static uint3 threadIdx;
static uint3 blockIdx;
static dim3  blockDim;
static dim3  gridDim;

namespace emulator {

constexpr int MAX_THREADS = 128;
constexpr int MAX_PART    = 64; // bytes that a thread brings to a meeting
constexpr size_t STACK    = 256*1024;

struct fiber {
    ucontext_t context;
    jmp_buf    place;
    bool       started;
    bool       done;
    int        warp_meetings;
    int        block_meetings;
    int        named_meetings[16];
};

static fiber      fibers[MAX_THREADS];
static ucontext_t home_context;
static jmp_buf    home;
static int        current;
static int        n_threads;
static long       n_steps; // meetings that threads have come to, and their ends
static const std::function<void()> * body;
static std::vector<char> stacks(MAX_THREADS*STACK);

static unsigned char parts[MAX_THREADS/32][2][32][MAX_PART];
static int           warp_came[MAX_THREADS/32][2];
static int           warp_left[MAX_THREADS/32][2];
static int           block_came[2];
static int           block_left[2];
static int           named_came[16][2];
static int           named_left[16][2];

static inline void pause() {
    if (_setjmp(fibers[current].place) == 0) {
        _longjmp(home, 1);
    }
}

static void entry() {
    (*body)();
    fibers[current].done = true;
    n_steps++;
    _longjmp(home, 1);
}

static void set_thread(int i) {
    current   = i;
    threadIdx = { i % blockDim.x, i / blockDim.x, 0 };
}

// until the thread has to wait, or is done
static void resume(int i) {
    set_thread(i);
    if (_setjmp(home) == 0) {
        if (fibers[i].started) {
            _longjmp(fibers[i].place, 1);
        }
        fibers[i].started = true;
        getcontext(&fibers[i].context);
        fibers[i].context.uc_stack.ss_sp   = stacks.data() + i*STACK;
        fibers[i].context.uc_stack.ss_size = STACK;
        fibers[i].context.uc_link          = &home_context;
        makecontext(&fibers[i].context, entry, 0);
        setcontext(&fibers[i].context);
    }
}

static void run_block() {
    memset(warp_came,  0, sizeof(warp_came));
    memset(warp_left,  0, sizeof(warp_left));
    memset(block_came, 0, sizeof(block_came));
    memset(block_left, 0, sizeof(block_left));
    memset(named_came, 0, sizeof(named_came));
    memset(named_left, 0, sizeof(named_left));
    for (int i = 0; i < n_threads; i++) {
        fibers[i].started = fibers[i].done = false;
        fibers[i].warp_meetings = fibers[i].block_meetings = 0;
        memset(fibers[i].named_meetings, 0, sizeof(fibers[i].named_meetings));
    }
    for (int left = n_threads; left > 0;) {
        for (int first = 0; first < n_threads; first += 32) {
            for (long before = -1; before != n_steps;) {
                before = n_steps;
                for (int i = first; i < first + 32; i++) {
                    if (!fibers[i].done) {
                        resume(i);
                        left -= fibers[i].done ? 1 : 0;
                    }
                }
            }
        }
    }
}

// runs f for all threads of all blocks; before_block prepares shared memory
template <typename F, typename B>
static void launch(dim3 grid, dim3 block, const F & f, const B & before_block) {
    const std::function<void()> g = f;
    body      = &g;
    gridDim   = grid;
    blockDim  = block;
    n_threads = (int) (block.x*block.y);
    if (n_threads > MAX_THREADS || n_threads % 32 != 0) {
        abort();
    }
    for (uint32_t z = 0; z < grid.z; z++) {
        for (uint32_t y = 0; y < grid.y; y++) {
            for (uint32_t x = 0; x < grid.x; x++) {
                blockIdx = { x, y, z };
                before_block();
                run_block();
            }
        }
    }
}

// every lane of the warp brings a part and gets those of all
template <typename T>
static inline void meet_warp(const T & part, T (&all)[32]) {
    static_assert(sizeof(T) <= MAX_PART, "part too large");
    const int w = current/32;
    const int h = fibers[current].warp_meetings++ & 1;
    memcpy(parts[w][h][current % 32], &part, sizeof(T));
    warp_came[w][h]++;
    n_steps++;
    while (warp_came[w][h] < 32) {
        pause();
    }
    for (int i = 0; i < 32; i++) {
        memcpy(&all[i], parts[w][h][i], sizeof(T));
    }
    if (++warp_left[w][h] == 32) {
        warp_came[w][h] = warp_left[w][h] = 0;
    }
}

// meetings: how many of these this thread had
static inline void meet(int & meetings, int (&came)[2], int (&left)[2], int n) {
    const int h = meetings++ & 1;
    came[h]++;
    n_steps++;
    while (came[h] < n) {
        pause();
    }
    if (++left[h] == n) {
        came[h] = left[h] = 0;
    }
}

} // namespace emulator

static inline void __syncthreads() {
    emulator::meet(emulator::fibers[emulator::current].block_meetings, emulator::block_came, emulator::block_left, emulator::n_threads);
}

// some warps of a CUDA block; each id is for the same ones throughout
static inline void __barrier_sync_count(unsigned id, unsigned n) {
    emulator::meet(emulator::fibers[emulator::current].named_meetings[id], emulator::named_came[id], emulator::named_left[id], (int) n);
}

// lane: of the lanes that lie together, width of them
template <typename T>
static inline T __shfl_sync(uint32_t, T v, int lane, int width) {
    T all[32];
    emulator::meet_warp(v, all);
    return all[emulator::current % 32/width*width + lane % width];
}

template <typename T>
static inline T __shfl_xor_sync(uint32_t, T v, int mask, int) {
    T all[32];
    emulator::meet_warp(v, all);
    return all[(emulator::current % 32) ^ mask];
}

static inline int __any_sync(uint32_t, bool v) {
    bool all[32];
    emulator::meet_warp(v, all);
    bool any = false;
    for (bool one : all) {
        any = any || one;
    }
    return any;
}

static inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t sel) {
    const uint64_t bytes = (uint64_t) b << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t nibble = (sel >> 4*i) & 15;
        if (nibble & 8) {
            abort(); // prmt would repeat the sign, no code here wants that
        }
        r |= (uint32_t) ((bytes >> 8*nibble) & 0xFF) << 8*i;
    }
    return r;
}

// of AMD: v_perm_b32, which takes a byte per selector, of the low word below 4
static inline uint32_t __builtin_amdgcn_perm(uint32_t high, uint32_t low, uint32_t sel) {
    const uint64_t bytes = (uint64_t) high << 32 | low;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t byte = (sel >> 8*i) & 0xFF;
        if (byte > 7) {
            abort(); // signs and constants, no code here wants those
        }
        r |= (uint32_t) ((bytes >> 8*byte) & 0xFF) << 8*i;
    }
    return r;
}

static inline uint32_t __funnelshift_r(uint32_t lo, uint32_t hi, uint32_t n) {
    return (uint32_t) (((uint64_t) hi << 32 | lo) >> (n & 31));
}

static inline int __float_as_int(float f) {
    int i;
    memcpy(&i, &f, sizeof(i));
    return i;
}

static inline float __int_as_float(int i) {
    float f;
    memcpy(&f, &i, sizeof(f));
    return f;
}

static inline int __float2int_rn(float f) {
    return (int) nearbyintf(f);
}

template <typename T> static inline T min(T a, T b) { return a < b ? a : b; }
template <typename T> static inline T max(T a, T b) { return a > b ? a : b; }

// f16, rounded once from double: products and sums of two halves are exact there
struct half { uint16_t bits; };
struct half2 { half x, y; };

static inline half half_from(double v) {
    const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
    v = std::fabs(v);
    if (std::isnan(v)) {
        return { 0x7FFF };
    }
    if (v >= 65520.0) {
        return { (uint16_t) (sign | 0x7C00) };
    }
    int e = 0;
    std::frexp(v, &e);
    e = e < -13 ? -13 : e; // subnormal below 2^-14
    const int q = (int) std::nearbyint(std::ldexp(v, 11 - e)); // ties to even; up to 2048
    return { (uint16_t) (sign | (v == 0.0 ? 0 : q + ((e + 13) << 10))) };
}

static inline float __half2float(half h) {
    const int e = (h.bits >> 10) & 31;
    const int m = h.bits & 0x3FF;
    const float v = e == 31 ? (m ? NAN : INFINITY) : e == 0 ? std::ldexp((float) m, -24) : std::ldexp((float) (m + 1024), e - 25);
    return h.bits & 0x8000 ? -v : v;
}

static inline half  __float2half_rn(float f)       { return half_from(f); }
static inline half2 make_half2(half x, half y)     { return { x, y }; }
static inline half2 make_half2(float x, float y)   { return { half_from(x), half_from(y) }; }
static inline half2 __hmul2(half2 a, half2 b) {
    return { half_from((double) __half2float(a.x)*__half2float(b.x)), half_from((double) __half2float(a.y)*__half2float(b.y)) };
}
static inline half2 __hfma2(half2 a, half2 b, half2 c) {
    return { half_from((double) __half2float(a.x)*__half2float(b.x) + __half2float(c.x)),
             half_from((double) __half2float(a.y)*__half2float(b.y) + __half2float(c.y)) };
}
