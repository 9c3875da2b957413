# cmake -C cmake/hip.cmake -S "$(ggufrq where source)" -B build
# For certain cards: -DCMAKE_HIP_ARCHITECTURES=gfx1100; ROCm elsewhere: -DCMAKE_PREFIX_PATH=/path/to/rocm.
include(${CMAKE_CURRENT_LIST_DIR}/cpu.cmake)

set(GGML_HIP ON CACHE BOOL "AMD's GPUs")
