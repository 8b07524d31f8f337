// The arithmetic of every row, written for the compiler's vectoriser and compiled once per instruction set.
//
// Included with SHAPLEYCAM_ARCH set to a namespace of its own. Nothing here may instantiate a template of the standard library:
// the linker could then hand code compiled for AVX-512 to a machine without it.

#if defined(SHAPLEYCAM_INTRINSICS)
#include "avx512.inl"
#endif

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

// max(x, 0) that keeps NaN.
template <typename T>
inline T positive(T x) {
  return x < T(0) ? T(0) : x;
}

template <typename T>
inline T plusplus_term(T w, T sum) {
  const T square = w * w;
  const T ratio = square / (T(2) * square + square * w * sum + T(1e-6));
  return w == T(0) ? T(0) : positive(w) * ratio;
}

// Without a Hessian-vector product `h` points at zeros, so that every row has one loop.
template <typename T>
inline T weight(const T* g, const T* h, int64_t i) {
  return g[i] - T(0.5) * h[i];
}

// Adds one run of positions of one channel, whose channel weight is known, to the map.
template <typename T>
inline void accumulate(int32_t pooling, T* out, const T* a, const T* g, const T* h, T alpha, int64_t count) {
  switch (pooling) {
    case SHAPLEYCAM_ELEMENTWISE:
      for (int64_t i = 0; i < count; ++i) out[i] += weight(g, h, i) * a[i];
      break;
    case SHAPLEYCAM_ELEMENTWISE_RELU:
      for (int64_t i = 0; i < count; ++i) out[i] += positive(weight(g, h, i) * a[i]);
      break;
    case SHAPLEYCAM_POSITIVE_GRADIENT:
      for (int64_t i = 0; i < count; ++i) out[i] += positive(weight(g, h, i)) * a[i];
      break;
    default:
      for (int64_t i = 0; i < count; ++i) out[i] += alpha * a[i];
  }
}

// The map's value at one position from a run of channels.
template <typename T>
inline T dot(int32_t pooling, const T* a, const T* g, const T* h, const T* alpha, int64_t count) {
  T sum = 0;
  switch (pooling) {
    case SHAPLEYCAM_ELEMENTWISE:
      for (int64_t i = 0; i < count; ++i) sum += weight(g, h, i) * a[i];
      break;
    case SHAPLEYCAM_ELEMENTWISE_RELU:
      for (int64_t i = 0; i < count; ++i) sum += positive(weight(g, h, i) * a[i]);
      break;
    case SHAPLEYCAM_POSITIVE_GRADIENT:
      for (int64_t i = 0; i < count; ++i) sum += positive(weight(g, h, i)) * a[i];
      break;
    default:
      for (int64_t i = 0; i < count; ++i) sum += alpha[i] * a[i];
  }
  return sum;
}

inline bool needs_weight(int32_t pooling) {
  return pooling == SHAPLEYCAM_ELEMENTWISE || pooling == SHAPLEYCAM_ELEMENTWISE_RELU || pooling == SHAPLEYCAM_POSITIVE_GRADIENT;
}

template <typename T>
struct Scratch {
  alignas(64) T a[kBlock], g[kBlock], h[kBlock], zeros[kBlock];
};

template <typename T>
inline const T* load_h(const ReduceTask& t, int64_t offset, int64_t count, int64_t stride, Scratch<T>& scratch) {
  return t.h.data == nullptr ? scratch.zeros : load(t.h, offset, count, stride, scratch.h);
}

// Channels first: one channel after the other, each a run of positions.
template <typename T>
void reduce_channels_first(const ReduceTask& t, Scratch<T>& scratch) {
  T* out = static_cast<T*>(t.out);
  const int64_t positions = t.positions;
  for (int64_t c = t.first; c < t.first + t.channels; ++c) {
    const int64_t oa = t.image * t.a.stride_n + c * t.a.stride_c;
    const int64_t og = t.image * t.g.stride_n + c * t.g.stride_c;
    const int64_t oh = t.image * t.h.stride_n + c * t.h.stride_c;
    const auto at_a = [&](int64_t s, int64_t k) { return load(t.a, oa + s * t.a.stride_s, k, t.a.stride_s, scratch.a); };
    const auto at_g = [&](int64_t s, int64_t k) { return load(t.g, og + s * t.g.stride_s, k, t.g.stride_s, scratch.g); };
    const auto at_h = [&](int64_t s, int64_t k) { return load_h(t, oh + s * t.h.stride_s, k, t.h.stride_s, scratch); };
    T first = 0, second = 0;
    if (t.pooling == SHAPLEYCAM_MEAN) {
      for (int64_t s = 0; s < positions; s += kBlock) {
        const int64_t k = positions - s < kBlock ? positions - s : kBlock;
        const T *g = at_g(s, k), *h = at_h(s, k);
        T sum = 0;
        for (int64_t i = 0; i < k; ++i) sum += weight(g, h, i);
        first += sum;
      }
      first /= static_cast<T>(positions);
    } else if (t.pooling == SHAPLEYCAM_ACTIVATION) {
      for (int64_t s = 0; s < positions; s += kBlock) {
        const int64_t k = positions - s < kBlock ? positions - s : kBlock;
        const T *a = at_a(s, k), *g = at_g(s, k), *h = at_h(s, k);
        T product = 0, sum = 0;
        for (int64_t i = 0; i < k; ++i) {
          product += weight(g, h, i) * a[i];
          sum += a[i];
        }
        first += product;
        second += sum;
      }
      first /= second + T(1e-7);
    } else if (t.pooling == SHAPLEYCAM_PLUSPLUS) {
      for (int64_t s = 0; s < positions; s += kBlock) {
        const int64_t k = positions - s < kBlock ? positions - s : kBlock;
        const T* a = at_a(s, k);
        T sum = 0;
        for (int64_t i = 0; i < k; ++i) sum += a[i];
        second += sum;
      }
      for (int64_t s = 0; s < positions; s += kBlock) {
        const int64_t k = positions - s < kBlock ? positions - s : kBlock;
        const T *g = at_g(s, k), *h = at_h(s, k);
        T sum = 0;
        for (int64_t i = 0; i < k; ++i) sum += plusplus_term(weight(g, h, i), second);
        first += sum;
      }
    }
    const bool weighted = needs_weight(t.pooling);
    for (int64_t s = 0; s < positions; s += kBlock) {
      const int64_t k = positions - s < kBlock ? positions - s : kBlock;
      const T* a = at_a(s, k);
      const T* g = weighted ? at_g(s, k) : a;
      const T* h = weighted ? at_h(s, k) : a;
      accumulate(t.pooling, out + s, a, g, h, first, k);
    }
  }
}

// Channels last: one position after the other, each a run of channels.
template <typename T>
void reduce_channels_last(const ReduceTask& t, Scratch<T>& scratch) {
  alignas(64) T first[kBlock], second[kBlock];
  T* out = static_cast<T*>(t.out);
  const int64_t k = t.channels;
  const int64_t oa = t.image * t.a.stride_n + t.first * t.a.stride_c;
  const int64_t og = t.image * t.g.stride_n + t.first * t.g.stride_c;
  const int64_t oh = t.image * t.h.stride_n + t.first * t.h.stride_c;
  const auto at_a = [&](int64_t s) { return load(t.a, oa + s * t.a.stride_s, k, t.a.stride_c, scratch.a); };
  const auto at_g = [&](int64_t s) { return load(t.g, og + s * t.g.stride_s, k, t.g.stride_c, scratch.g); };
  const auto at_h = [&](int64_t s) { return load_h(t, oh + s * t.h.stride_s, k, t.h.stride_c, scratch); };
  const bool weighted = needs_weight(t.pooling);
  if (!weighted) {
    for (int64_t i = 0; i < k; ++i) first[i] = second[i] = 0;
    if (t.pooling == SHAPLEYCAM_PLUSPLUS) {
      for (int64_t s = 0; s < t.positions; ++s) {
        const T* a = at_a(s);
        for (int64_t i = 0; i < k; ++i) second[i] += a[i];
      }
    }
    for (int64_t s = 0; s < t.positions; ++s) {
      const T *g = at_g(s), *h = at_h(s);
      if (t.pooling == SHAPLEYCAM_MEAN) {
        for (int64_t i = 0; i < k; ++i) first[i] += weight(g, h, i);
      } else if (t.pooling == SHAPLEYCAM_ACTIVATION) {
        const T* a = at_a(s);
        for (int64_t i = 0; i < k; ++i) {
          first[i] += weight(g, h, i) * a[i];
          second[i] += a[i];
        }
      } else {
        for (int64_t i = 0; i < k; ++i) first[i] += plusplus_term(weight(g, h, i), second[i]);
      }
    }
    if (t.pooling == SHAPLEYCAM_MEAN) {
      for (int64_t i = 0; i < k; ++i) first[i] /= static_cast<T>(t.positions);
    } else if (t.pooling == SHAPLEYCAM_ACTIVATION) {
      for (int64_t i = 0; i < k; ++i) first[i] /= second[i] + T(1e-7);
    }
  }
  for (int64_t s = 0; s < t.positions; ++s) {
    const T* a = at_a(s);
    out[s] = dot(t.pooling, a, weighted ? at_g(s) : a, weighted ? at_h(s) : a, first, k);
  }
}

template <typename T>
void reduce(const ReduceTask& t) {
#if defined(SHAPLEYCAM_INTRINSICS)
  if constexpr (sizeof(T) == 4) {
    if (fast::reduce(t)) return;
  }
#endif
  Scratch<T> scratch;
  if (t.h.data == nullptr) {
    for (int64_t i = 0; i < kBlock; ++i) scratch.zeros[i] = 0;
  }
  // A layout is channels last only if its channels are the closer neighbours; a single position has no layout.
  if (t.a.stride_c == 1 && t.a.stride_s != 1) {
    reduce_channels_last(t, scratch);
    return;
  }
  for (int64_t s = 0; s < t.positions; ++s) static_cast<T*>(t.out)[s] = 0;
  reduce_channels_first(t, scratch);
}

template <typename T>
void sum(const SumTask& t) {
#if defined(SHAPLEYCAM_INTRINSICS)
  if constexpr (sizeof(T) == 4) {
    if (fast::sum(t)) return;
  }
#endif
  alignas(64) T scratch[kBlock];
  T* out = static_cast<T*>(t.out);
  const T* alpha = static_cast<const T*>(t.alpha);
  const int64_t base = t.image * t.a.stride_n + t.first * t.a.stride_c;
  if (t.a.stride_c == 1 && t.a.stride_s != 1) {
    for (int64_t s = 0; s < t.positions; ++s) {
      const T* a = load(t.a, base + s * t.a.stride_s, t.channels, 1, scratch);
      for (int64_t m = 0; m < t.rows; ++m) {
        out[m * t.out_stride + s] = dot<T>(SHAPLEYCAM_MEAN, a, a, a, alpha + m * t.alpha_stride, t.channels);
      }
    }
    return;
  }
  for (int64_t m = 0; m < t.rows; ++m) {
    for (int64_t s = 0; s < t.positions; ++s) out[m * t.out_stride + s] = 0;
  }
  for (int64_t c = 0; c < t.channels; ++c) {
    for (int64_t s = 0; s < t.positions; s += kBlock) {
      const int64_t k = t.positions - s < kBlock ? t.positions - s : kBlock;
      const T* a = load(t.a, base + c * t.a.stride_c + s * t.a.stride_s, k, t.a.stride_s, scratch);
      for (int64_t m = 0; m < t.rows; ++m) {
        const T weight_of_row = alpha[m * t.alpha_stride + c];
        T* row = out + m * t.out_stride + s;
        for (int64_t i = 0; i < k; ++i) row[i] += weight_of_row * a[i];
      }
    }
  }
}

// out[i] = sum over p of parts[p * stride + i], in the order of p.
template <typename T>
void add(void* out, const void* parts, int64_t count, int64_t parts_count, int64_t stride) {
  T* to = static_cast<T*>(out);
  const T* from = static_cast<const T*>(parts);
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  for (int64_t p = 1; p < parts_count; ++p) {
    for (int64_t i = 0; i < count; ++i) to[i] += from[p * stride + i];
  }
}

}  // namespace SHAPLEYCAM_ARCH
}  // namespace shapleycam

#include "display.inl"
#include "utility.inl"

namespace shapleycam {
namespace SHAPLEYCAM_ARCH {

constexpr Kernels kKernels = {SHAPLEYCAM_ARCH_NAME, reduce<float>,  reduce<double>,  sum<float>,
                              sum<double>,          add<float>,     add<double>,     utility_rows<float>,
                              utility_rows<double>, display<float>, display<double>, overlay};

}  // namespace SHAPLEYCAM_ARCH
}  // namespace shapleycam
