// The rows compiled for avx2; see the flags in CMakeLists.txt.
#include "task.h"

#define SHAPLEYCAM_ARCH avx2
#define SHAPLEYCAM_ARCH_NAME "avx2"
#include "rows.inl"

namespace shapleycam {
const Kernels& avx2_kernels() { return avx2::kKernels; }
}  // namespace shapleycam
