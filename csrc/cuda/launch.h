// How kernels are launched: by nvcc's syntax, or by the tests' emulator where a C++ compiler reads these files.
#pragma once

#include <cuda_runtime.h>

#include "../checks.h"

#if defined(__CUDACC__)
#define SHAPLEYCAM_LAUNCH(kernel, grid, threads, shared, stream, ...) \
  (kernel)<<<(grid), (threads), (shared), (stream)>>>(__VA_ARGS__)
#define SHAPLEYCAM_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char shapleycam_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(shapleycam_dynamic_shared)
#else
#define SHAPLEYCAM_LAUNCH(kernel, grid, threads, shared, stream, ...) \
  ((void)(stream), cuda_on_cpu::launch(kernel, grid, threads, shared, __VA_ARGS__))
#define SHAPLEYCAM_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(cuda_on_cpu::dynamic_shared())
#endif

namespace shapleycam {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksWanted = 2 * 132;  // two per multiprocessor of the largest chip this is built for

// Takes the error with it: CUDA keeps the last one, and the next call's launch is not to answer for this one's.
inline int32_t launched() { return cudaGetLastError() == cudaSuccess ? SHAPLEYCAM_OK : SHAPLEYCAM_LAUNCH_FAILED; }

// A grid's second and third extents end at 65535; kernels go on in steps of the grid.
inline unsigned grid_extent(int64_t wanted) { return static_cast<unsigned>(wanted < 65535 ? wanted : 65535); }

}  // namespace shapleycam
