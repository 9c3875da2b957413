# cmake -C cmake/cuda.cmake -S "$(ggufrq where source)" -B build
# For certain cards: -DCMAKE_CUDA_ARCHITECTURES=89-real; a toolkit elsewhere: -DCMAKE_CUDA_COMPILER=/path/to/nvcc.
include(${CMAKE_CURRENT_LIST_DIR}/cpu.cmake)

set(GGML_CUDA ON CACHE BOOL "NVIDIA's GPUs")
