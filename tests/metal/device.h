#pragma once

#include "ggml-metal-device.h"
#include "ggml-metal-ops.h"

#undef ggml_type_name // the tests' names are those of types, not of kernels

#include <set>
#include <string>
#include <vector>

constexpr size_t FAKE_METAL_MEMORY = 32*1024; // of a threadgroup, as all Apple GPUs have it

// run the graph's operations through upstream's host code and the shim, in the tensors' own memory
void fake_metal_compute(ggml_cgraph * gf);

// bytes that the memory of t must have: an operation may keep intermediate results behind its own
size_t fake_metal_alloc_size(const ggml_tensor * t);

ggml_metal_device_t fake_metal_device();

// the kernels that have been run, or only named in a dry run
const std::vector<std::string> & fake_metal_launched();

void fake_metal_dry_run(bool dry);

// the names of all kernels that the host side has asked for
const std::set<std::string> & fake_metal_looked_up();
