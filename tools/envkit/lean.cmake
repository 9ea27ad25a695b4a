# Read by llama-cpp-python's CMake project. It forces llama.cpp's "common" library on (chat parsers, downloads,
# argument parsing), which this project never calls and which is half of all compile time. A normal variable
# hides the forced cache entry. llama.cpp's multimodal library needs none of it, and is what benchmarks compare with.
set(LLAMA_BUILD_COMMON OFF)
