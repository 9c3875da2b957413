# cmake -C cmake/cpu.cmake -S "$(ggufrq where source)" -B build
# For any processor of the architecture: -DGGML_NATIVE=OFF.
include(${CMAKE_CURRENT_LIST_DIR}/common.cmake)

if(CMAKE_HOST_APPLE)
  set(GGML_METAL OFF CACHE BOOL "upstream switches it on there")
endif()
