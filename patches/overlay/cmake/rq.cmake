# Our sources into the targets that upstream's CMake files have made: ggml-base, every variant of ggml-cpu, and llama where
# it is there (a build of ggml alone includes this file after ggml), and a program of ours. CUDA, HIP and Metal find theirs by themselves.

get_target_property(RQ_GGML ggml-base SOURCE_DIR)

target_sources(ggml-base PRIVATE "${RQ_GGML}/ggml-rq.c")

file(GLOB RQ_SOURCES CONFIGURE_DEPENDS "${RQ_GGML}/ggml-cpu/rq*.c" "${RQ_GGML}/ggml-cpu/rq*.cpp")
get_property(RQ_TARGETS DIRECTORY "${RQ_GGML}" PROPERTY BUILDSYSTEM_TARGETS)
foreach (target IN LISTS RQ_TARGETS)
    # not those that find out what a CPU can do: they are for any
    if (target MATCHES "^ggml-cpu" AND NOT target MATCHES "-feats$")
        target_sources(${target} PRIVATE ${RQ_SOURCES})
    endif()
endforeach()

if (TARGET llama)
    get_target_property(RQ_LLAMA llama SOURCE_DIR)
    file(GLOB RQ_SOURCES CONFIGURE_DEPENDS "${RQ_LLAMA}/llama-rq*.cpp")
    target_sources(llama PRIVATE ${RQ_SOURCES})
endif()

if (TARGET llama AND LLAMA_BUILD_COMMON AND LLAMA_BUILD_TOOLS)
    add_executable(llama-rq-moments "${CMAKE_CURRENT_SOURCE_DIR}/tools/rq-moments/rq-moments.cpp")
    target_link_libraries(llama-rq-moments PRIVATE llama-common llama)
    target_compile_features(llama-rq-moments PRIVATE cxx_std_17)
endif()

# ggml.h includes it
include(GNUInstallDirs)
install(FILES "${RQ_GGML}/../include/ggml-rq-ids.h" DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
