# cmake -C cmake/vulkan.cmake -S "$(ggufrq where source)" -B build
# LunarG's SDK where the system has none: VULKAN_SDK=/path/to/it, in the environment.
include(${CMAKE_CURRENT_LIST_DIR}/cpu.cmake)

set(GGML_VULKAN ON CACHE BOOL "GPUs by their Vulkan drivers")
