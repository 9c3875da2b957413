#pragma once

// Threads of a threadgroup as fibers of one thread: each runs until it meets a simd function or a barrier, and goes on
// when the others have come there, too. Only one runs at a time, so that a missing barrier shows as stale data.

#include <cstddef>
#include <cstdint>

namespace lanes {

constexpr int WIDTH = 32; // threads of a simdgroup

struct grid {
    uint32_t groups[3];  // threadgroups in the grid
    uint32_t threads[3]; // threads in a threadgroup
};

// where the running thread is
struct position {
    uint32_t group[3];
    uint32_t at[3]; // in the threadgroup
    uint32_t index; // the same as one number
    const grid * in;
};

extern position self;

inline int lane()     { return (int) self.index % WIDTH; }
inline int simdgroup() { return (int) self.index / WIDTH; }

// combine what each lane of the simdgroup gives: called once for all, data[l] is null where lane l has returned
using combine_t = void (*)(void ** data);

// all lanes of the simdgroup that have not returned meet here, at the same `combine`, or the program aborts
void meet(combine_t combine, void * data);

// all threads of the threadgroup that have not returned meet here
void barrier();

// run `thread` for each thread of each threadgroup of the grid. It gets the memory of its threadgroup, which is filled
// with NaN beforehand.
void run(const grid & grid, size_t memory, void (*thread)(void * context, void * memory), void * context);

} // namespace lanes
