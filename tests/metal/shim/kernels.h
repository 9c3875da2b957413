#pragma once

// Kernels that were compiled for the host, by the names that the host side looks up. Plain C types only: kernels and
// the program that runs them come from two compilers with two C++ libraries. No names that are words of Metal.

#include <cstddef>
#include <cstdint>

#include "lanes.h"

namespace kernels {

constexpr int MAX_BUFFERS = 31;

struct arguments {
    void * buffers[MAX_BUFFERS];
};

// a pointer to what the kernel takes it for
struct pointer {
    void * p;

    template <typename T> operator T *() const { return (T *) p; }
};

struct setter {
    int index;
    void (*set)(int64_t value);
};

struct value {
    int     index;
    int64_t value;
};

struct library; // one compiled .metal file

struct entry {
    const char * name;
    void (*run)(void * arguments, void * memory); // one thread
    const library * from;
};

struct library {
    const char *     name;
    const setter *  setters;
    size_t           n_setters;
    entry *          entries;
    size_t           n_entries;
    library *        next;
};

void add(library * library);

const entry * find(const char * name); // null where there is none

// set the function constants, all others of the library to 0, and run the kernel, see lanes.h
void launch(const entry * entry, const value * values, size_t n_values, const lanes::grid & grid, size_t memory, arguments & arguments);

} // namespace kernels
