// The kernels compiled for baseline; see the flags in CMakeLists.txt.
#define SHAPLEYCAM_ARCH baseline
#if defined(__aarch64__)
#define SHAPLEYCAM_ARCH_NAME "neon"
#else
#define SHAPLEYCAM_ARCH_NAME "baseline"
#endif
#include "kernels.inl"

namespace shapleycam {
const Kernels& baseline_kernels() { return baseline::kKernels; }
}  // namespace shapleycam
