# cmake -C cmake/portable.cmake -DGGML_NATIVE=OFF -S "$(ggufrq where source)" -B build
# One build for all processors of the architecture: code for each kind is a module, of which the best is loaded.
include(${CMAKE_CURRENT_LIST_DIR}/cpu.cmake)

set(GGML_BACKEND_DL ON CACHE BOOL "backends are modules")
set(GGML_CPU_ALL_VARIANTS ON CACHE BOOL "one for each kind of processor")
