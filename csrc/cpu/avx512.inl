// Sixteen float32 lanes of AVX-512 as a number that the headers' arithmetic can work with, and the loops over runs of elements:
// half precision is widened in registers, and masks serve the ends of rows, which matter where a map has 49 positions.
#pragma once

#include <immintrin.h>

#include "task.h"

namespace shapleycam {
namespace SHAPLEYCAM_ARCH {
namespace fast {

constexpr int64_t kLanes = 16;

struct Lanes {
  __m512 v;
  Lanes() = default;
  Lanes(__m512 v) : v(v) {}
  explicit Lanes(float x) : v(_mm512_set1_ps(x)) {}
};

inline Lanes operator+(Lanes a, Lanes b) { return _mm512_add_ps(a.v, b.v); }
inline Lanes operator-(Lanes a, Lanes b) { return _mm512_sub_ps(a.v, b.v); }
inline Lanes operator*(Lanes a, Lanes b) { return _mm512_mul_ps(a.v, b.v); }
inline Lanes operator/(Lanes a, Lanes b) { return _mm512_div_ps(a.v, b.v); }
inline Lanes& operator+=(Lanes& a, Lanes b) { return a = a + b; }
inline __mmask16 operator<(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline __mmask16 operator==(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
inline Lanes choose(__mmask16 condition, Lanes yes, Lanes no) { return _mm512_mask_mov_ps(no.v, condition, yes.v); }
template <typename No>
inline Lanes choose(__mmask16 condition, Lanes yes, No no) {
  return choose(condition, yes, Lanes(no()));
}

inline float sum_of_lanes(Lanes x) { return _mm512_reduce_add_ps(x.v); }
inline Lanes read(const float* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
inline void write(float* p, __mmask16 m, Lanes x) { _mm512_mask_storeu_ps(p, m, x.v); }

struct float32_tag {};
struct float16_tag {};
struct bfloat16_tag {};

// Asks for what will be read some rows later: short rows, which start anywhere in a line, hold the hardware's own guesses up.
template <typename E>
inline void ahead(const E* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p) + 2048, _MM_HINT_T0);
}

inline __mmask16 ends(int64_t left) { return static_cast<__mmask16>((1u << left) - 1u); }

inline __m512 widen(__m256i x, float16_tag) { return _mm512_cvtph_ps(x); }
inline __m512 widen(__m256i x, bfloat16_tag) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

template <typename Tag>
struct In {
  using Element = uint16_t;
  static Lanes all(const Element* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), Tag{}); }
  static Lanes some(const Element* p, __mmask16 m) { return widen(_mm256_maskz_loadu_epi16(m, p), Tag{}); }
};

template <>
struct In<float32_tag> {
  using Element = float;
  static Lanes all(const Element* p) { return _mm512_loadu_ps(p); }
  static Lanes some(const Element* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
};

// Calls body(offset, load) over a run; load(p) reads the 16 elements at p, zeros beyond the run's end.
template <typename I, typename Body>
inline void each(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i, [](const typename I::Element* p) { return I::all(p); }, __mmask16(0xffff));
  if (i < count) {
    const __mmask16 m = ends(count - i);
    body(i, [m](const typename I::Element* p) { return I::some(p, m); }, m);
  }
}

// The sum of product(offset, load, mask) over a run. Four sums at a time: one would wait for itself.
template <typename I, typename Product>
inline float sum_of(int64_t count, Product product) {
  Lanes sums[4] = {Lanes(0.0f), Lanes(0.0f), Lanes(0.0f), Lanes(0.0f)};
  const auto all = [](const typename I::Element* p) { return I::all(p); };
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int k = 0; k < 4; ++k) sums[k] += product(i + k * kLanes, all, __mmask16(0xffff));
  }
  each<I>(count - i, [&](int64_t j, auto load, __mmask16 m) { sums[0] += product(i + j, load, m); });
  return sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// A map of up to kHeld vectors is summed in registers: through memory, every masked store at a row's end would have to reach
// the cache before the next channel could read it back.
constexpr int kHeld = 14;  // 14 x 14 positions and more; leaves registers for the operands

template <int kVectors>
struct Held {
  static constexpr int kCount = kVectors;
  Lanes sum[kVectors];
  __mmask16 end;
  explicit Held(int64_t positions) : end(ends(positions - (kVectors - 1) * kLanes)) {
    for (int v = 0; v < kVectors; ++v) sum[v] = Lanes(0.0f);
  }
  // Calls add(v, load) for every vector of the row; load(p) reads 16 elements, zeros beyond the end.
  template <typename I, typename Add>
  inline void row(Add add) {
    for (int v = 0; v < kVectors - 1; ++v) add(v, [](const typename I::Element* p) { return I::all(p); });
    const __mmask16 m = end;
    add(kVectors - 1, [m](const typename I::Element* p) { return I::some(p, m); });
  }
  void store(float* out) const {
    for (int v = 0; v < kVectors - 1; ++v) write(out + v * kLanes, __mmask16(0xffff), sum[v]);
    write(out + (kVectors - 1) * kLanes, end, sum[kVectors - 1]);
  }
};

// Calls body(a Held of the right size) for a map that fits; false if it does not.
template <int kVectors = 1, typename Body>
inline bool held(int64_t positions, Body body) {
  if constexpr (kVectors <= kHeld) {
    if (positions <= kVectors * kLanes) {
      body(Held<kVectors>(positions));
      return true;
    }
    return held<kVectors + 1>(positions, body);
  }
  return false;
}

}  // namespace fast
}  // namespace SHAPLEYCAM_ARCH
}  // namespace shapleycam
