# cmake -C cmake/metal.cmake -S "$(ggufrq where source)" -B build
include(${CMAKE_CURRENT_LIST_DIR}/common.cmake)

set(GGML_METAL ON CACHE BOOL "Apple's GPUs")
set(GGML_METAL_EMBED_LIBRARY ON CACHE BOOL "kernels in the library, compiled by macOS at start")
