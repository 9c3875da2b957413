# What every build of ours sets. Included by the file of each backend; `ggufrq build` reads the same lines.

set(CMAKE_BUILD_TYPE Release CACHE STRING "optimized")
# not by CMAKE_BUILD_RPATH_USE_ORIGIN: CMake ends such a path with ':', which is the folder that one is in
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON CACHE BOOL "the path below, in the build, too")
if(CMAKE_HOST_APPLE)
  set(CMAKE_INSTALL_RPATH @loader_path CACHE STRING "as below, in the words of macOS; the first one counts")
endif()
set(CMAKE_INSTALL_RPATH $ORIGIN CACHE STRING "programs find their libraries wherever the folder is")
set(BUILD_SHARED_LIBS ON CACHE BOOL "one copy of ggml for all programs")
set(GGML_RPC ON CACHE BOOL "devices of other machines")
set(LLAMA_BUILD_APP OFF CACHE BOOL "not needed")
set(LLAMA_BUILD_EXAMPLES OFF CACHE BOOL "not needed")
set(LLAMA_BUILD_TESTS ON CACHE BOOL "targets only, compiled when they are asked for")
set(LLAMA_BUILD_UI OFF CACHE BOOL "takes npm")
set(LLAMA_OPENSSL OFF CACHE BOOL "models are fetched by ggufrq")
set(LLAMA_USE_PREBUILT_UI OFF CACHE BOOL "takes the network")
set(LLAMA_BUILD_NUMBER 0 CACHE STRING "upstream counts commits, which a pinned tree without history cannot")

if(CMAKE_HOST_LINUX)
  set(CMAKE_EXE_LINKER_FLAGS_INIT -Wl,--disable-new-dtags CACHE STRING "their own libraries go before LD_LIBRARY_PATH")
  set(CMAKE_SHARED_LINKER_FLAGS_INIT -Wl,--disable-new-dtags CACHE STRING "the same for what these load")
endif()
