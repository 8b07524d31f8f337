// How elements of any dtype and stride become runs of numbers, compiled once per instruction set.
#pragma once

#include "task.h"

namespace shapleycam {
namespace SHAPLEYCAM_ARCH {

inline float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline float widen_bfloat16(uint16_t x) { return from_bits(static_cast<uint32_t>(x) << 16); }

inline float widen_float16(uint16_t x) {
  // Shifting the exponent into place and scaling by 2^112 is exact for normal and subnormal numbers alike.
  const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
  const float scaled = from_bits(magnitude) * from_bits(0x77800000u);
  uint32_t bits;
  __builtin_memcpy(&bits, &scaled, 4);
  bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bits;  // Inf and NaN keep their payload
  return from_bits(bits | sign);
}

// A run of `count` elements of a view as T, in place where it already is that, else converted into `scratch`.
template <typename T, typename S, typename Widen>
inline const T* convert(const S* source, int64_t count, int64_t stride, T* scratch, Widen widen) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) scratch[i] = static_cast<T>(widen(source[i]));
  } else if (stride == 0) {
    const T value = static_cast<T>(widen(source[0]));
    for (int64_t i = 0; i < count; ++i) scratch[i] = value;
  } else {
    for (int64_t i = 0; i < count; ++i) scratch[i] = static_cast<T>(widen(source[i * stride]));
  }
  return scratch;
}

template <typename T>
inline const T* load(const shapleycam_view& view, int64_t offset, int64_t count, int64_t stride, T* scratch) {
  const auto same = [](auto x) { return x; };
  switch (view.dtype) {
    case SHAPLEYCAM_FLOAT32: {
      const float* p = static_cast<const float*>(view.data) + offset;
      if constexpr (sizeof(T) == 4) {
        if (stride == 1) return p;
      }
      return convert(p, count, stride, scratch, same);
    }
    case SHAPLEYCAM_FLOAT64: {
      const double* p = static_cast<const double*>(view.data) + offset;
      if constexpr (sizeof(T) == 8) {
        if (stride == 1) return p;
      }
      return convert(p, count, stride, scratch, same);
    }
    case SHAPLEYCAM_FLOAT16:
      return convert(static_cast<const uint16_t*>(view.data) + offset, count, stride, scratch, widen_float16);
    default:
      return convert(static_cast<const uint16_t*>(view.data) + offset, count, stride, scratch, widen_bfloat16);
  }
}

}  // namespace SHAPLEYCAM_ARCH
}  // namespace shapleycam
