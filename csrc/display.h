// The display form of a map and its picture: where a position of the resized map reads, and what becomes of a value.
#pragma once

#include <stdint.h>

#include "anywhere.h"

namespace shapleycam {

// One axis of the map: how many positions it has and gets. I is what they are counted in: a GPU divides 32-bit numbers in a
// fraction of the time.
template <typename T, typename I = int64_t>
struct Axis {
  I from, to;
  T scale;
};

template <typename T, typename I = int64_t>
static inline Axis<T, I> axis_of(int64_t from, int64_t to) {
  return {static_cast<I>(from), static_cast<I>(to), static_cast<T>(from) / static_cast<T>(to)};
}

// The two neighbours that a position reads, and how far it is from the first to the second.
template <typename T, typename I = int64_t>
struct Place {
  I low, high;
  T weight;
};

// Half-pixel centres.
template <typename T, typename I>
SHAPLEYCAM_ANYWHERE static inline Place<T, I> place(I i, const Axis<T, I>& axis) {
  T x = axis.scale * (static_cast<T>(i) + T(0.5)) - T(0.5);
  x = x < T(0) ? T(0) : x;
  I low = static_cast<I>(x);
  low = low < axis.from - 1 ? low : axis.from - 1;
  return {low, static_cast<I>(low + (low < axis.from - 1 ? 1 : 0)), x - static_cast<T>(low)};
}

template <typename T>
SHAPLEYCAM_ANYWHERE static inline T between(T a, T b, T weight) {
  return (T(1) - weight) * a + weight * b;
}

// The first position that reads at or beyond `low`, or axis.to.
template <typename T, typename I>
SHAPLEYCAM_ANYWHERE static inline I first_reaching(I low, const Axis<T, I>& axis) {
  if (low >= axis.from) return axis.to;
  I i = static_cast<I>((static_cast<T>(low) + T(0.5)) / axis.scale - T(0.5));
  i = i < 0 ? 0 : (i < axis.to ? i : axis.to);
  // Rounding may have put the guess off by a step.
  while (i > 0 && place(i - 1, axis).low >= low) --i;
  while (i < axis.to && place(i, axis).low < low) ++i;
  return i;
}

// The second min-max needs the extent of the resized map before any of it can be written. Between two neighbours of the raw map
// the resized one is linear along every axis, so on the positions that fall between them it is extreme at the first or the
// last: some (2 from)^2 positions tell the extent of to^2. How many positions of an axis can be extreme, and which.
template <typename T, typename I>
SHAPLEYCAM_ANYWHERE static inline I extremes(const Axis<T, I>& axis) {
  return 2 * axis.from < axis.to ? 2 * axis.from : axis.to;
}

template <typename T, typename I>
SHAPLEYCAM_ANYWHERE static inline I extreme(I q, const Axis<T, I>& axis) {
  if (extremes(axis) == axis.to) return q;
  const I i = first_reaching(static_cast<I>(q / 2 + q % 2), axis) - q % 2;
  return i < 0 ? 0 : (i < axis.to ? i : axis.to - 1);
}

// What a min-max divides by.
template <typename T>
SHAPLEYCAM_ANYWHERE static inline T divisor_of(T low, T high) {
#if defined(__CUDA_ARCH__)
  const T range = high - low;
#else
  // Volatile keeps a compiler that may reassociate from (1e-7 + high) - low, which is 0 for a constant map.
  const volatile T range = high - low;
#endif
  return T(1e-7) + range;
}

// A value of the raw map after max(., 0) and the first min-max.
template <typename T>
SHAPLEYCAM_ANYWHERE static inline T unit_of(T raw, T low, T divisor) {
  return (positive(raw) - low) / divisor;
}

// After the second min-max; rounding may carry a value a step beyond the extremes.
template <typename T>
SHAPLEYCAM_ANYWHERE static inline T renormalized(T value, T low, T divisor) {
  return clamped((value - low) / divisor);
}

// NaN becomes 0: a byte cannot say it.
template <typename T>
SHAPLEYCAM_ANYWHERE static inline uint8_t byte_of(T unit) {
  const T scaled = unit > T(0) ? unit * T(255) : T(0);
  return static_cast<uint8_t>(static_cast<int32_t>(nearest(scaled < T(255) ? scaled : T(255))));
}

// The colour of a heat that is a number: its place in the table of 256.
SHAPLEYCAM_ANYWHERE static inline int32_t colour_of(float heat) {
  return static_cast<int32_t>(nearest(clamped(heat) * 255.0f));
}

// A channel of a pixel under the heat's colour.
SHAPLEYCAM_ANYWHERE static inline uint8_t blended(float base, uint8_t colour, float alpha) {
  return byte_of((1.0f - alpha) * clamped(base) + alpha * (static_cast<float>(colour) / 255.0f));
}

// Heat that is no number shows as a colour that no table has.
SHAPLEYCAM_ANYWHERE static inline void mark_unknown(uint8_t* to) {
  to[0] = 255;
  to[1] = 0;
  to[2] = 255;
}

}  // namespace shapleycam
