// The kernels compiled for avx2; see the flags in CMakeLists.txt.
#define SHAPLEYCAM_ARCH avx2
#define SHAPLEYCAM_ARCH_NAME "avx2"
#include "kernels.inl"

namespace shapleycam {
const Kernels& avx2_kernels() { return avx2::kKernels; }
}  // namespace shapleycam
