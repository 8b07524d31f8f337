// The four utilities in the logits, for every kernel that needs them.
#pragma once

#include "anywhere.h"
#include "include/shapleycam.h"

namespace shapleycam {

// Of internal linkage, since every instruction set compiles its own. What multiplies e_c, p and p * z0 in U' - U'' z0 / 2,
// where z0 = z - b and s = p . z0. The gradients and curvatures of the utilities live in the span of these three vectors (arXiv
// 2501.06261, section 4.2).
template <typename T>
struct Coefficients {
  T on_class, on_p, on_pz;
};

template <typename T>
SHAPLEYCAM_ANYWHERE static inline Coefficients<T> coefficients(int32_t utility, int32_t order, T p_c, T z0_c, T s) {
  const T half = order == 2 ? T(0.5) : T(0);
  switch (utility) {
    case SHAPLEYCAM_LOGIT:
      return {T(1), T(0), T(0)};
    case SHAPLEYCAM_PROBABILITY:
      if (order == 1) return {p_c, -p_c, T(0)};
      return {p_c * (T(1) - half * (z0_c - s)), -p_c * (T(1) + half * (T(2) * s - z0_c)), half * p_c};
    default:
      // Order 1 says nothing about s, which may be NaN where a logit is -Inf.
      return {utility == SHAPLEYCAM_REST ? T(2) : T(1), order == 2 ? T(-1) - half * s : T(-1), half};
  }
}

}  // namespace shapleycam
