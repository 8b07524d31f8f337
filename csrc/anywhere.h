// Arithmetic that CPU and GPU share: how a function for both is declared, and the few operations that are spelled differently.
//
// Functions here, and in the headers that include this, are static: every instruction set compiles its own, and a function that
// the linker may merge could hand code compiled for AVX-512 to a machine without it. For the same reason the types have data
// and no functions.
#pragma once

#if defined(__CUDACC__)
#define SHAPLEYCAM_ANYWHERE __host__ __device__
#else
#define SHAPLEYCAM_ANYWHERE
#endif

namespace shapleycam {

// For numbers; vectors of them, whose conditions are masks, bring their own. What is computed only where it is chosen is a
// function: GCC 12 loses the NaN of a product that it computes first and chooses then.
template <typename T>
SHAPLEYCAM_ANYWHERE static inline T choose(bool condition, T yes, T no) {
  return condition ? yes : no;
}

template <typename T, typename No>
SHAPLEYCAM_ANYWHERE static inline T choose(bool condition, T yes, No no) {
  return condition ? yes : no();
}

// max(x, 0) that keeps NaN.
template <typename T>
SHAPLEYCAM_ANYWHERE static inline T positive(T x) {
  return choose(x < T(0), T(0), x);
}

// To [0, 1]; NaN stays.
template <typename T>
SHAPLEYCAM_ANYWHERE static inline T clamped(T x) {
  return x < T(0) ? T(0) : (x > T(1) ? T(1) : x);
}

// To the nearest whole number, halves to the even one.
#if defined(__CUDACC__)
SHAPLEYCAM_ANYWHERE static inline float nearest(float x) { return rintf(x); }
SHAPLEYCAM_ANYWHERE static inline double nearest(double x) { return rint(x); }
#else
SHAPLEYCAM_ANYWHERE static inline float nearest(float x) { return __builtin_rintf(x); }
SHAPLEYCAM_ANYWHERE static inline double nearest(double x) { return __builtin_rint(x); }
#endif

}  // namespace shapleycam
