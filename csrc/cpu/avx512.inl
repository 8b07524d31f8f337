// The rows that read every input once, in AVX-512 intrinsics: half precision is widened in registers, and masks serve the ends
// of rows, which matter where a map has 49 positions. Everything else, and every other machine, takes the loops of rows.inl.
#include <immintrin.h>

namespace shapleycam {
namespace SHAPLEYCAM_ARCH {
namespace fast {

constexpr int64_t kLanes = 16;

struct float32_tag {};
struct float16_tag {};
struct bfloat16_tag {};

inline __mmask16 ends(int64_t left) { return static_cast<__mmask16>((1u << left) - 1u); }

inline __m512 widen(__m256i x, float16_tag) { return _mm512_cvtph_ps(x); }
inline __m512 widen(__m256i x, bfloat16_tag) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

template <typename Tag>
struct In {
  using Element = uint16_t;
  static __m512 all(const Element* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), Tag{}); }
  static __m512 some(const Element* p, __mmask16 m) { return widen(_mm256_maskz_loadu_epi16(m, p), Tag{}); }
};

template <>
struct In<float32_tag> {
  using Element = float;
  static __m512 all(const Element* p) { return _mm512_loadu_ps(p); }
  static __m512 some(const Element* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
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

inline __m512 positive(__m512 x) {
  return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), _mm512_setzero_ps());
}

template <bool kSecond, typename Load, typename E>
inline __m512 weight(Load load, const E* g, const E* h) {
  const __m512 w = load(g);
  if constexpr (kSecond) return _mm512_fnmadd_ps(_mm512_set1_ps(0.5f), load(h), w);
  return w;
}

template <int kPooling>
inline __m512 term(__m512 a, __m512 w) {
  if constexpr (kPooling == SHAPLEYCAM_ELEMENTWISE_RELU) return positive(_mm512_mul_ps(w, a));
  if constexpr (kPooling == SHAPLEYCAM_POSITIVE_GRADIENT) return _mm512_mul_ps(positive(w), a);
  return _mm512_mul_ps(w, a);
}

template <typename I, bool kSecond, int kPooling>
void channels_first(const ReduceTask& t) {
  using E = typename I::Element;
  float* out = static_cast<float*>(t.out);
  for (int64_t s = 0; s < t.positions; ++s) out[s] = 0;
  const auto run = [&](const shapleycam_view& v, int64_t c) {
    return static_cast<const E*>(v.data) + t.image * v.stride_n + c * v.stride_c;
  };
  for (int64_t c = t.first; c < t.first + t.channels; ++c) {
    const E *a = run(t.a, c), *g = run(t.g, c), *h = kSecond ? run(t.h, c) : g;
    if constexpr (kPooling == SHAPLEYCAM_MEAN) {
      __m512 sum = _mm512_setzero_ps();
      each<I>(t.positions,
              [&](int64_t i, auto load, __mmask16) { sum = _mm512_add_ps(sum, weight<kSecond>(load, g + i, h + i)); });
      const __m512 alpha = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / static_cast<float>(t.positions));
      each<I>(t.positions, [&](int64_t i, auto load, __mmask16 m) {
        _mm512_mask_storeu_ps(out + i, m, _mm512_fmadd_ps(alpha, load(a + i), _mm512_maskz_loadu_ps(m, out + i)));
      });
    } else {
      each<I>(t.positions, [&](int64_t i, auto load, __mmask16 m) {
        const __m512 x = term<kPooling>(load(a + i), weight<kSecond>(load, g + i, h + i));
        _mm512_mask_storeu_ps(out + i, m, _mm512_add_ps(x, _mm512_maskz_loadu_ps(m, out + i)));
      });
    }
  }
}

template <typename I, bool kSecond, int kPooling>
void channels_last(const ReduceTask& t) {
  using E = typename I::Element;
  alignas(64) float alpha[kBlock];
  float* out = static_cast<float*>(t.out);
  const auto run = [&](const shapleycam_view& v, int64_t s) {
    return static_cast<const E*>(v.data) + t.image * v.stride_n + t.first + s * v.stride_s;
  };
  if constexpr (kPooling == SHAPLEYCAM_MEAN) {
    for (int64_t i = 0; i < t.channels; ++i) alpha[i] = 0;
    // Two positions to a pass halve the traffic of the running sums.
    int64_t s = 0;
    for (; s + 2 <= t.positions; s += 2) {
      const E *g0 = run(t.g, s), *h0 = kSecond ? run(t.h, s) : g0, *g1 = run(t.g, s + 1), *h1 = kSecond ? run(t.h, s + 1) : g1;
      each<I>(t.channels, [&](int64_t i, auto load, __mmask16 m) {
        const __m512 w = _mm512_add_ps(weight<kSecond>(load, g0 + i, h0 + i), weight<kSecond>(load, g1 + i, h1 + i));
        _mm512_mask_storeu_ps(alpha + i, m, _mm512_add_ps(w, _mm512_maskz_loadu_ps(m, alpha + i)));
      });
    }
    if (s < t.positions) {
      const E *g = run(t.g, s), *h = kSecond ? run(t.h, s) : g;
      each<I>(t.channels, [&](int64_t i, auto load, __mmask16 m) {
        const __m512 w = weight<kSecond>(load, g + i, h + i);
        _mm512_mask_storeu_ps(alpha + i, m, _mm512_add_ps(w, _mm512_maskz_loadu_ps(m, alpha + i)));
      });
    }
    for (int64_t i = 0; i < t.channels; ++i) alpha[i] /= static_cast<float>(t.positions);
  }
  for (int64_t s = 0; s < t.positions; ++s) {
    const E *a = run(t.a, s), *g = run(t.g, s), *h = kSecond ? run(t.h, s) : g;
    __m512 sum = _mm512_setzero_ps();
    each<I>(t.channels, [&](int64_t i, auto load, __mmask16 m) {
      if constexpr (kPooling == SHAPLEYCAM_MEAN) {
        sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(m, alpha + i), load(a + i), sum);
      } else {
        sum = _mm512_add_ps(sum, term<kPooling>(load(a + i), weight<kSecond>(load, g + i, h + i)));
      }
    });
    out[s] = _mm512_reduce_add_ps(sum);
  }
}

template <typename I, bool kSecond>
bool pick_row(const ReduceTask& t, bool last) {
#define SHAPLEYCAM_ROW(row)                                                        \
  case row:                                                                        \
    last ? channels_last<I, kSecond, row>(t) : channels_first<I, kSecond, row>(t); \
    return true;
  switch (t.pooling) {
    SHAPLEYCAM_ROW(SHAPLEYCAM_MEAN)
    SHAPLEYCAM_ROW(SHAPLEYCAM_ELEMENTWISE)
    SHAPLEYCAM_ROW(SHAPLEYCAM_ELEMENTWISE_RELU)
    SHAPLEYCAM_ROW(SHAPLEYCAM_POSITIVE_GRADIENT)
    default:
      return false;
  }
#undef SHAPLEYCAM_ROW
}

template <typename I>
bool pick_order(const ReduceTask& t, bool last) {
  return t.h.data != nullptr ? pick_row<I, true>(t, last) : pick_row<I, false>(t, last);
}

// Whether the task was one of these; then it is done.
inline bool reduce(const ReduceTask& t) {
  const bool second = t.h.data != nullptr;
  if (t.g.dtype != t.a.dtype || (second && t.h.dtype != t.a.dtype)) return false;
  const bool first = t.a.stride_s == 1 && t.g.stride_s == 1 && (!second || t.h.stride_s == 1);
  const bool last = t.a.stride_c == 1 && t.g.stride_c == 1 && (!second || t.h.stride_c == 1);
  if (!first && !last) return false;
  switch (t.a.dtype) {
    case SHAPLEYCAM_FLOAT32:
      return pick_order<In<float32_tag>>(t, !first);
    case SHAPLEYCAM_FLOAT16:
      return pick_order<In<float16_tag>>(t, !first);
    case SHAPLEYCAM_BFLOAT16:
      return pick_order<In<bfloat16_tag>>(t, !first);
    default:
      return false;
  }
}

}  // namespace fast
}  // namespace SHAPLEYCAM_ARCH
}  // namespace shapleycam
