// The rows in AVX-512 intrinsics: half precision is widened in registers, and masks serve the ends
// of rows, which matter where a map has 49 positions. Mixed layouts and dtypes, and every other machine, take the loops of
// rows.inl.
#include <immintrin.h>

namespace shapleycam {
namespace SHAPLEYCAM_ARCH {
namespace fast {

constexpr int64_t kLanes = 16;

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

// The sum of product(offset, load, mask) over a run. Four sums at a time: one would wait for itself.
template <typename I, typename Product>
inline float sum_of(int64_t count, Product product) {
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  const auto all = [](const typename I::Element* p) { return I::all(p); };
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int k = 0; k < 4; ++k) sums[k] = _mm512_add_ps(sums[k], product(i + k * kLanes, all, __mmask16(0xffff)));
  }
  each<I>(count - i, [&](int64_t j, auto load, __mmask16 m) { sums[0] = _mm512_add_ps(sums[0], product(i + j, load, m)); });
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
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

// Rows whose weight is one number per channel, which takes a sum over the positions first.
template <int kPooling>
constexpr bool kPools = kPooling == SHAPLEYCAM_MEAN || kPooling == SHAPLEYCAM_ACTIVATION || kPooling == SHAPLEYCAM_PLUSPLUS;

inline __m512 plusplus_term(__m512 w, __m512 sum) {
  const __m512 square = _mm512_mul_ps(w, w), two = _mm512_set1_ps(2.0f), tiny = _mm512_set1_ps(1e-6f);
  const __m512 below = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(square, w), sum, _mm512_mul_ps(two, square)), tiny);
  const __m512 term = _mm512_mul_ps(positive(w), _mm512_div_ps(square, below));
  return _mm512_mask_mov_ps(term, _mm512_cmp_ps_mask(w, _mm512_setzero_ps(), _CMP_EQ_OQ), _mm512_setzero_ps());
}

// What one vector adds to a channel's sum (for "plusplus", `activations` is their whole sum, else a running one).
template <int kPooling, typename Load, typename E>
inline __m512 pooled(__m512 sum, __m512 w, Load load, const E* a, __m512& activations) {
  if constexpr (kPooling == SHAPLEYCAM_PLUSPLUS) return _mm512_add_ps(sum, plusplus_term(w, activations));
  if constexpr (kPooling == SHAPLEYCAM_ACTIVATION) {
    const __m512 x = load(a);
    activations = _mm512_add_ps(activations, x);
    return _mm512_fmadd_ps(w, x, sum);
  }
  return _mm512_add_ps(sum, w);
}

// The weight of one channel; loop(body) calls body(offset, load) over its positions.
template <bool kSecond, int kPooling, typename E, typename Loop>
inline __m512 channel_weight(const E* a, const E* g, const E* h, int64_t positions, Loop loop) {
  __m512 sum = _mm512_setzero_ps(), activations = _mm512_setzero_ps();
  if constexpr (kPooling == SHAPLEYCAM_PLUSPLUS) {
    loop([&](int64_t i, auto load) { activations = _mm512_add_ps(activations, load(a + i)); });
    activations = _mm512_set1_ps(_mm512_reduce_add_ps(activations));
  }
  loop([&](int64_t i, auto load) {
    sum = pooled<kPooling>(sum, weight<kSecond>(load, g + i, h + i), load, a + i, activations);
  });
  float alpha = _mm512_reduce_add_ps(sum);
  if constexpr (kPooling == SHAPLEYCAM_MEAN) alpha /= static_cast<float>(positions);
  if constexpr (kPooling == SHAPLEYCAM_ACTIVATION) alpha /= _mm512_reduce_add_ps(activations) + 1e-7f;
  return _mm512_set1_ps(alpha);
}

// A map of up to kHeld vectors is summed in registers: through memory, every masked store at a row's end would have to reach
// the cache before the next channel could read it back.
constexpr int kHeld = 14;  // 14 x 14 positions and more; leaves registers for the operands

template <int kVectors>
struct Held {
  static constexpr int kCount = kVectors;
  __m512 sum[kVectors];
  __mmask16 end;
  explicit Held(int64_t positions) : end(ends(positions - (kVectors - 1) * kLanes)) {
    for (int v = 0; v < kVectors; ++v) sum[v] = _mm512_setzero_ps();
  }
  // Calls add(v, load) for every vector of the row; load(p) reads 16 elements, zeros beyond the end.
  template <typename I, typename Add>
  inline void row(Add add) {
    for (int v = 0; v < kVectors - 1; ++v) add(v, [](const typename I::Element* p) { return I::all(p); });
    const __mmask16 m = end;
    add(kVectors - 1, [m](const typename I::Element* p) { return I::some(p, m); });
  }
  void store(float* out) const {
    for (int v = 0; v < kVectors - 1; ++v) _mm512_storeu_ps(out + v * kLanes, sum[v]);
    _mm512_mask_storeu_ps(out + (kVectors - 1) * kLanes, end, sum[kVectors - 1]);
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

template <typename I, bool kSecond, int kPooling>
void channels_first(const ReduceTask& t) {
  using E = typename I::Element;
  float* out = static_cast<float*>(t.out);
  const auto run = [&](const shapleycam_view& v, int64_t c) {
    return static_cast<const E*>(v.data) + t.image * v.stride_n + c * v.stride_c;
  };
  const bool small = held(t.positions, [&](auto map) {
    for (int64_t c = t.first; c < t.first + t.channels; ++c) {
      const E *a = run(t.a, c), *g = run(t.g, c), *h = kSecond ? run(t.h, c) : g;
      for (int v = 0; v < map.kCount; ++v) {
        ahead(a + v * kLanes);
        ahead(g + v * kLanes);
        if (kSecond) ahead(h + v * kLanes);
      }
      if constexpr (kPools<kPooling>) {
        const __m512 alpha = channel_weight<kSecond, kPooling>(
            a, g, h, t.positions, [&](auto body) { map.template row<I>([&](int v, auto load) { body(v * kLanes, load); }); });
        map.template row<I>([&](int v, auto load) { map.sum[v] = _mm512_fmadd_ps(alpha, load(a + v * kLanes), map.sum[v]); });
      } else {
        map.template row<I>([&](int v, auto load) {
          const __m512 w = weight<kSecond>(load, g + v * kLanes, h + v * kLanes);
          map.sum[v] = _mm512_add_ps(map.sum[v], term<kPooling>(load(a + v * kLanes), w));
        });
      }
    }
    map.store(out);
  });
  if (small) return;
  for (int64_t s = 0; s < t.positions; ++s) out[s] = 0;
  for (int64_t c = t.first; c < t.first + t.channels; ++c) {
    const E *a = run(t.a, c), *g = run(t.g, c), *h = kSecond ? run(t.h, c) : g;
    if constexpr (kPools<kPooling>) {
      const __m512 alpha = channel_weight<kSecond, kPooling>(a, g, h, t.positions, [&](auto body) {
        each<I>(t.positions, [&](int64_t i, auto load, __mmask16) { body(i, load); });
      });
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
  alignas(64) float alpha[kBlock], activations[kBlock];
  float* out = static_cast<float*>(t.out);
  const auto run = [&](const shapleycam_view& v, int64_t s) {
    return static_cast<const E*>(v.data) + t.image * v.stride_n + t.first + s * v.stride_s;
  };
  if constexpr (kPools<kPooling>) {
    constexpr bool kSums = kPooling != SHAPLEYCAM_MEAN;
    for (int64_t i = 0; i < t.channels; ++i) alpha[i] = activations[i] = 0;
    if constexpr (kPooling == SHAPLEYCAM_PLUSPLUS) {
      for (int64_t s = 0; s < t.positions; ++s) {
        const E* a = run(t.a, s);
        each<I>(t.channels, [&](int64_t i, auto load, __mmask16 m) {
          _mm512_mask_storeu_ps(activations + i, m, _mm512_add_ps(_mm512_maskz_loadu_ps(m, activations + i), load(a + i)));
        });
      }
    }
    // Several positions to a pass, so that the running sums travel less. Measured on 40 images out of cache, one core: float32
    // gains a fifth by it, and halves, whose sums are twice as long as their rows, lose a third.
    constexpr int kTogether = sizeof(E) == 4 ? 4 : 1;
    for (int64_t s = 0; s < t.positions; s += kTogether) {
      const E *a[kTogether], *g[kTogether], *h[kTogether];
      const int64_t left = t.positions - s, live = left < kTogether ? left : kTogether;
      for (int k = 0; k < kTogether; ++k) {
        const int64_t at = k < left ? s + k : s;
        a[k] = run(t.a, at), g[k] = run(t.g, at), h[k] = kSecond ? run(t.h, at) : g[k];
      }
      each<I>(t.channels, [&](int64_t i, auto load, __mmask16 m) {
        __m512 sum = _mm512_maskz_loadu_ps(m, alpha + i), sum_of_a = sum;
        if constexpr (kSums) sum_of_a = _mm512_maskz_loadu_ps(m, activations + i);
        const auto add = [&](int64_t k) {
          sum = pooled<kPooling>(sum, weight<kSecond>(load, g[k] + i, h[k] + i), load, a[k] + i, sum_of_a);
        };
        if (live == kTogether) {
          for (int k = 0; k < kTogether; ++k) add(k);
        } else {
          for (int64_t k = 0; k < live; ++k) add(k);
        }
        _mm512_mask_storeu_ps(alpha + i, m, sum);
        if constexpr (kPooling == SHAPLEYCAM_ACTIVATION) _mm512_mask_storeu_ps(activations + i, m, sum_of_a);
      });
    }
    if constexpr (kPooling != SHAPLEYCAM_PLUSPLUS) {
      for (int64_t i = 0; i < t.channels; ++i) {
        alpha[i] /= kPooling == SHAPLEYCAM_MEAN ? static_cast<float>(t.positions) : activations[i] + 1e-7f;
      }
    }
  }
  for (int64_t s = 0; s < t.positions; ++s) {
    const E *a = run(t.a, s), *g = run(t.g, s), *h = kSecond ? run(t.h, s) : g;
    const auto product = [&](int64_t i, auto load, __mmask16 m) {
      if constexpr (kPools<kPooling>) return _mm512_mul_ps(_mm512_maskz_loadu_ps(m, alpha + i), load(a + i));
      return term<kPooling>(load(a + i), weight<kSecond>(load, g + i, h + i));
    };
    out[s] = sum_of<I>(t.channels, product);
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
    SHAPLEYCAM_ROW(SHAPLEYCAM_ACTIVATION)
    SHAPLEYCAM_ROW(SHAPLEYCAM_POSITIVE_GRADIENT)
    SHAPLEYCAM_ROW(SHAPLEYCAM_PLUSPLUS)
    default:
      return false;
  }
#undef SHAPLEYCAM_ROW
}

template <typename I>
bool pick_order(const ReduceTask& t, bool last) {
  return t.h.data != nullptr ? pick_row<I, true>(t, last) : pick_row<I, false>(t, last);
}

template <typename I>
void sum_rows(const SumTask& t, bool last) {
  using E = typename I::Element;
  float* out = static_cast<float*>(t.out);
  const float* alpha = static_cast<const float*>(t.alpha);
  const E* base = static_cast<const E*>(t.a.data) + t.image * t.a.stride_n + t.first * t.a.stride_c;
  if (last) {
    for (int64_t s = 0; s < t.positions; ++s) {
      const E* a = base + s * t.a.stride_s;
      for (int64_t m = 0; m < t.rows; ++m) {
        const float* weights = alpha + m * t.alpha_stride;
        out[m * t.out_stride + s] = sum_of<I>(t.channels, [&](int64_t i, auto load, __mmask16 mask) {
          return _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, weights + i), load(a + i));
        });
      }
    }
    return;
  }
  const bool small = held(t.positions, [&](auto fresh) {
    for (int64_t m = 0; m < t.rows; ++m) {
      auto map = fresh;
      const float* weights = alpha + m * t.alpha_stride;
      for (int64_t c = 0; c < t.channels; ++c) {
        const E* a = base + c * t.a.stride_c;
        for (int v = 0; v < map.kCount; ++v) ahead(a + v * kLanes);
        const __m512 weight_of_row = _mm512_set1_ps(weights[c]);
        map.template row<I>(
            [&](int v, auto load) { map.sum[v] = _mm512_fmadd_ps(weight_of_row, load(a + v * kLanes), map.sum[v]); });
      }
      map.store(out + m * t.out_stride);
    }
  });
  if (small) return;
  for (int64_t m = 0; m < t.rows; ++m) {
    for (int64_t s = 0; s < t.positions; ++s) out[m * t.out_stride + s] = 0;
  }
  // Four channels to a pass quarter the traffic of the map.
  for (int64_t c = 0; c < t.channels; c += 4) {
    const E* a[4];
    for (int k = 0; k < 4; ++k) a[k] = base + (c + k < t.channels ? c + k : c) * t.a.stride_c;
    for (int64_t m = 0; m < t.rows; ++m) {
      __m512 weights[4];
      for (int k = 0; k < 4; ++k) {
        weights[k] = _mm512_set1_ps(c + k < t.channels ? alpha[m * t.alpha_stride + c + k] : 0.0f);
      }
      float* row = out + m * t.out_stride;
      const int64_t live = t.channels - c < 4 ? t.channels - c : 4;
      each<I>(t.positions, [&](int64_t i, auto load, __mmask16 mask) {
        __m512 x = _mm512_maskz_loadu_ps(mask, row + i);
        if (live == 4) {
          for (int k = 0; k < 4; ++k) x = _mm512_fmadd_ps(weights[k], load(a[k] + i), x);
        } else {
          for (int64_t k = 0; k < live; ++k) x = _mm512_fmadd_ps(weights[k], load(a[k] + i), x);
        }
        _mm512_mask_storeu_ps(row + i, mask, x);
      });
    }
  }
}

// Whether the task was one of these; then it is done.
inline bool sum(const SumTask& t) {
  const bool first = t.a.stride_s == 1, last = t.a.stride_c == 1;
  if (!first && !last) return false;
  switch (t.a.dtype) {
    case SHAPLEYCAM_FLOAT32:
      sum_rows<In<float32_tag>>(t, !first);
      return true;
    case SHAPLEYCAM_FLOAT16:
      sum_rows<In<float16_tag>>(t, !first);
      return true;
    case SHAPLEYCAM_BFLOAT16:
      sum_rows<In<bfloat16_tag>>(t, !first);
      return true;
    default:
      return false;
  }
}

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
