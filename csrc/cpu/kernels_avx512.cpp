// The kernels compiled for avx512; see the flags in CMakeLists.txt.
#define SHAPLEYCAM_ARCH avx512
#define SHAPLEYCAM_ARCH_NAME "avx512"
#define SHAPLEYCAM_INTRINSICS
#include "kernels.inl"

namespace shapleycam {
const Kernels& avx512_kernels() { return avx512::kKernels; }
}  // namespace shapleycam
