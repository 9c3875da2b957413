#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700 // ucontext on macOS
#endif
#include "lanes.h"

#include <algorithm>
#include <csetjmp>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <ucontext.h>
#include <vector>

namespace lanes {

position self;

namespace {

constexpr size_t STACK  = 256*1024;
constexpr size_t SLACK  = 4*1024; // upstream's vector kernel zeroes beyond its memory where NE > 1, unread

enum state { RUNS, MEETS, AT_BARRIER, RETURNED };

struct fiber {
    jmp_buf    jump;
    position   where;
    state      is;
    bool       entered = false;
    combine_t  combine;
    void     * data;
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(STACK);
};

std::vector<std::unique_ptr<fiber>> fibers; // the first `count` are the threads of the running threadgroup
size_t     count;
size_t     current;
jmp_buf    home;
ucontext_t home_context;

void   (*body)(void *, void *);
void * body_context;
char * body_memory;

[[noreturn]] void fail(const char * what) {
    fprintf(stderr, "shim: %s (threadgroup %u %u %u)\n", what, self.group[0], self.group[1], self.group[2]);
    abort();
}

// a fiber stays for the threads that come after: a jump is much cheaper than a new context
void enter() {
    for (;;) {
        body(body_context, body_memory);
        fiber & f = *fibers[current];
        f.is = RETURNED;
        if (_setjmp(f.jump) == 0) {
            _longjmp(home, 1);
        }
    }
}

// run the fiber until it waits or returns
void resume(size_t i) {
    current = i;
    fiber & f = *fibers[i];
    self = f.where;
    if (_setjmp(home) == 0) {
        if (f.entered) {
            _longjmp(f.jump, 1);
        }
        f.entered = true;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp   = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link          = nullptr;
        makecontext(&f.context, enter, 0);
        swapcontext(&home_context, &f.context);
    }
}

void wait(state is) {
    fiber & f = *fibers[current];
    f.is = is;
    if (_setjmp(f.jump) == 0) {
        _longjmp(home, 1);
    }
}

// let the lanes of a simdgroup go on, if all that have not returned have met
bool release(size_t first) {
    void *    data[WIDTH] = {};
    combine_t combine     = nullptr;
    for (size_t i = first; i < first + WIDTH && i < count; i++) {
        const fiber & f = *fibers[i];
        if (f.is == RETURNED) {
            continue;
        }
        if (f.is != MEETS) {
            return false;
        }
        if (combine && combine != f.combine) {
            fail("lanes of one simdgroup meet in different simd functions");
        }
        combine = f.combine;
        data[i - first] = f.data;
    }
    if (!combine) {
        return false;
    }
    combine(data);
    for (size_t i = first; i < first + WIDTH && i < count; i++) {
        if (fibers[i]->is == MEETS) {
            fibers[i]->is = RUNS;
        }
    }
    return true;
}

void run_group() {
    for (;;) {
        bool ran = false;
        for (size_t first = 0; first < count; first += WIDTH) {
            // from the last lane to the first, since kernels let the first write what the others are done with: lanes of
            // a GPU go in step
            do {
                for (size_t i = std::min(first + WIDTH, count); i-- > first;) {
                    if (fibers[i]->is == RUNS) {
                        resume(i);
                        ran = true;
                    }
                }
            } while (release(first));
        }
        size_t returned = 0;
        size_t waiting  = 0;
        for (size_t i = 0; i < count; i++) {
            returned += fibers[i]->is == RETURNED;
            waiting  += fibers[i]->is == AT_BARRIER;
        }
        if (returned == count) {
            return;
        }
        if (returned + waiting == count) {
            for (size_t i = 0; i < count; i++) {
                if (fibers[i]->is == AT_BARRIER) {
                    fibers[i]->is = RUNS;
                }
            }
        } else if (!ran) {
            fail("some threads wait in a simd function for others that wait at a barrier");
        }
    }
}

} // namespace

void meet(combine_t combine, void * data) {
    fibers[current]->combine = combine;
    fibers[current]->data    = data;
    wait(MEETS);
}

void barrier() {
    wait(AT_BARRIER);
}

void run(const grid & grid, size_t memory, void (*thread)(void *, void *), void * context) {
    const auto & t = grid.threads;
    count = (size_t) t[0]*t[1]*t[2];
    while (fibers.size() < count) {
        fibers.push_back(std::make_unique<fiber>());
    }
    std::vector<std::max_align_t> shared((memory + SLACK)/sizeof(std::max_align_t));
    body         = thread;
    body_context = context;
    body_memory  = (char *) shared.data();

    for (uint32_t z = 0; z < grid.groups[2]; z++) for (uint32_t y = 0; y < grid.groups[1]; y++) for (uint32_t x = 0; x < grid.groups[0]; x++) {
        memset(shared.data(), 0xff, shared.size()*sizeof(shared[0]));
        for (size_t i = 0; i < count; i++) {
            fiber & f = *fibers[i];
            f.is      = RUNS;
            f.where   = {
                { x, y, z }, { (uint32_t) i%t[0], (uint32_t) i/t[0]%t[1], (uint32_t) i/(t[0]*t[1]) }, (uint32_t) i, &grid,
            };
        }
        run_group();
    }
}

} // namespace lanes
