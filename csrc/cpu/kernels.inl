// The kernels of one instruction set, by name; included with SHAPLEYCAM_ARCH, SHAPLEYCAM_ARCH_NAME and, where there are rows in
// intrinsics, SHAPLEYCAM_INTRINSICS.
#include "display.inl"
#include "rows.inl"
#include "utility.inl"
#if defined(SHAPLEYCAM_INTRINSICS)
#include "avx512_rows.inl"
#endif

namespace shapleycam {
namespace SHAPLEYCAM_ARCH {

#if !defined(SHAPLEYCAM_INTRINSICS)
constexpr auto reduce_f32 = reduce<float>;
constexpr auto sum_f32 = sum<float>;
#endif

constexpr Kernels kKernels = {SHAPLEYCAM_ARCH_NAME, reduce_f32,     reduce<double>,  sum_f32,
                              sum<double>,          add<float>,     add<double>,     utility_rows<float>,
                              utility_rows<double>, display<float>, display<double>, overlay};

}  // namespace SHAPLEYCAM_ARCH
}  // namespace shapleycam
