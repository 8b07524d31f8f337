// The rows compiled for baseline; see the flags in CMakeLists.txt.
#include "task.h"

#define SHAPLEYCAM_ARCH baseline
#if defined(__aarch64__)
#define SHAPLEYCAM_ARCH_NAME "neon"
#else
#define SHAPLEYCAM_ARCH_NAME "baseline"
#endif
#include "rows.inl"

namespace shapleycam {
const Kernels& baseline_kernels() { return baseline::kKernels; }
}  // namespace shapleycam
