// weighted_reduce and channel_weighted_sum of one task in AVX-512 intrinsics. Mixed layouts and dtypes take the loops of
// rows.inl, as every other machine does.
#pragma once

#include "../pooling.h"
#include "avx512.inl"
#include "rows.inl"

namespace shapleycam {
namespace SHAPLEYCAM_ARCH {
namespace fast {

template <bool kSecond, typename Load, typename E>
inline Lanes weight_at(Load load, const E* g, const E* h) {
  if constexpr (kSecond) return weight<Lanes>(load(g), load(h));
  return load(g);
}

// Adds one vector, of weights w and activations at a, to the channel's sums.
template <int kRow, typename Load, typename E>
inline void pool_at(Load load, Lanes w, const E* a, Lanes& sum, Lanes& activations) {
  if constexpr (kRow == SHAPLEYCAM_ACTIVATION) {
    pool<kRow>(w, load(a), sum, activations);
  } else {
    pool<kRow>(w, w, sum, activations);
  }
}

// The weight of one channel, in runs of positions that are summed in float32: loop(s, count, body) calls body(offset, load)
// over `count` of them from s.
template <bool kSecond, int kRow, typename E, typename Loop>
inline Lanes channel_weight_of(const E* a, const E* g, const E* h, int64_t positions, Loop loop) {
  constexpr int64_t kRun = kTogether * kLanes;
  float sum = 0, activations = 0;
  const auto every_run = [&](auto body) {
    for (int64_t s = 0; s < positions; s += kRun) body(s, positions - s < kRun ? positions - s : kRun);
  };
  if constexpr (kRow == SHAPLEYCAM_PLUSPLUS) {
    every_run([&](int64_t s, int64_t count) {
      Lanes part(0.0f);
      loop(s, count, [&](int64_t i, auto load) { part += load(a + i); });
      activations += sum_of_lanes(part);
    });
  }
  every_run([&](int64_t s, int64_t count) {
    Lanes part(0.0f), part_of_a(kRow == SHAPLEYCAM_PLUSPLUS ? activations : 0.0f);
    loop(s, count,
         [&](int64_t i, auto load) { pool_at<kRow>(load, weight_at<kSecond>(load, g + i, h + i), a + i, part, part_of_a); });
    sum += sum_of_lanes(part);
    if constexpr (kRow == SHAPLEYCAM_ACTIVATION) activations += sum_of_lanes(part_of_a);
  });
  return Lanes(channel_weight<kRow>(sum, activations, positions));
}

template <typename I, bool kSecond, int kRow>
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
      if constexpr (kPools<kRow>) {
        // All positions are one run.
        const Lanes alpha = channel_weight_of<kSecond, kRow>(a, g, h, t.positions, [&](int64_t, int64_t, auto body) {
          map.template row<I>([&](int v, auto load) { body(v * kLanes, load); });
        });
        map.template row<I>([&](int v, auto load) { map.sum[v] += alpha * load(a + v * kLanes); });
      } else {
        map.template row<I>([&](int v, auto load) {
          map.sum[v] += term<kRow>(weight_at<kSecond>(load, g + v * kLanes, h + v * kLanes), load(a + v * kLanes));
        });
      }
    }
    map.store(out);
  });
  if (small) return;
  for (int64_t s = 0; s < t.positions; ++s) out[s] = 0;
  for (int64_t c = t.first; c < t.first + t.channels; ++c) {
    const E *a = run(t.a, c), *g = run(t.g, c), *h = kSecond ? run(t.h, c) : g;
    if constexpr (kPools<kRow>) {
      const Lanes alpha = channel_weight_of<kSecond, kRow>(a, g, h, t.positions, [&](int64_t s, int64_t count, auto body) {
        each<I>(count, [&](int64_t i, auto load, __mmask16) { body(s + i, load); });
      });
      each<I>(t.positions,
              [&](int64_t i, auto load, __mmask16 m) { write(out + i, m, read(out + i, m) + alpha * load(a + i)); });
    } else {
      each<I>(t.positions, [&](int64_t i, auto load, __mmask16 m) {
        const Lanes x = term<kRow>(weight_at<kSecond>(load, g + i, h + i), load(a + i));
        write(out + i, m, x + read(out + i, m));
      });
    }
  }
}

template <typename I, bool kSecond, int kRow>
void channels_last(const ReduceTask& t) {
  using E = typename I::Element;
  alignas(64) float alpha[kBlock], activations[kBlock];
  float* out = static_cast<float*>(t.out);
  const auto run = [&](const shapleycam_view& v, int64_t s) {
    return static_cast<const E*>(v.data) + t.image * v.stride_n + t.first + s * v.stride_s;
  };
  if constexpr (kPools<kRow>) {
    alignas(64) double whole[kBlock], whole_of_a[kBlock];
    for (int64_t i = 0; i < t.channels; ++i) alpha[i] = activations[i] = 0;
    if constexpr (kRow == SHAPLEYCAM_PLUSPLUS) {
      for (int64_t s = 0; s < t.positions; ++s) {
        const E* a = run(t.a, s);
        each<I>(t.channels,
                [&](int64_t i, auto load, __mmask16 m) { write(activations + i, m, read(activations + i, m) + load(a + i)); });
        put_by(s, t.positions, activations, whole_of_a, t.channels);
      }
    }
    // Several positions to a pass, so that the running sums travel less. Measured on 40 images out of cache, one core: float32
    // gains a fifth by it, and halves, whose sums are twice as long as their rows, lose a third.
    constexpr int kPass = sizeof(E) == 4 ? 4 : 1;
    static_assert(kTogether % kPass == 0, "the parts are put by between two passes");
    for (int64_t s = 0; s < t.positions; s += kPass) {
      const E *a[kPass], *g[kPass], *h[kPass];
      const int64_t left = t.positions - s, live = left < kPass ? left : kPass;
      for (int k = 0; k < kPass; ++k) {
        const int64_t at = k < left ? s + k : s;
        a[k] = run(t.a, at), g[k] = run(t.g, at), h[k] = kSecond ? run(t.h, at) : g[k];
      }
      each<I>(t.channels, [&](int64_t i, auto load, __mmask16 m) {
        Lanes sum = read(alpha + i, m), sum_of_a = sum;
        if constexpr (kRow != SHAPLEYCAM_MEAN) sum_of_a = read(activations + i, m);
        const auto add = [&](int64_t k) {
          pool_at<kRow>(load, weight_at<kSecond>(load, g[k] + i, h[k] + i), a[k] + i, sum, sum_of_a);
        };
        if (live == kPass) {
          for (int k = 0; k < kPass; ++k) add(k);
        } else {
          for (int64_t k = 0; k < live; ++k) add(k);
        }
        write(alpha + i, m, sum);
        if constexpr (kRow == SHAPLEYCAM_ACTIVATION) write(activations + i, m, sum_of_a);
      });
      put_by(s + live - 1, t.positions, alpha, whole, t.channels);
      if constexpr (kRow == SHAPLEYCAM_ACTIVATION) put_by(s + live - 1, t.positions, activations, whole_of_a, t.channels);
    }
    channel_weights(kRow, alpha, activations, t.positions, t.channels);
  }
  for (int64_t s = 0; s < t.positions; ++s) {
    const E *a = run(t.a, s), *g = run(t.g, s), *h = kSecond ? run(t.h, s) : g;
    const auto product = [&](int64_t i, auto load, __mmask16 m) {
      if constexpr (kPools<kRow>) return read(alpha + i, m) * load(a + i);
      return term<kRow>(weight_at<kSecond>(load, g + i, h + i), load(a + i));
    };
    out[s] = sum_of<I>(t.channels, product);
  }
}

template <typename I>
bool pick(const ReduceTask& t, bool last) {
  return with_row(t.pooling, [&](auto which) {
    constexpr int kRow = decltype(which)::value;
    if constexpr (kRow == kGiven) {
      return false;
    } else if (t.h.data != nullptr) {
      last ? channels_last<I, true, kRow>(t) : channels_first<I, true, kRow>(t);
    } else {
      last ? channels_last<I, false, kRow>(t) : channels_first<I, false, kRow>(t);
    }
    return true;
  });
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
        out[m * t.out_stride + s] =
            sum_of<I>(t.channels, [&](int64_t i, auto load, __mmask16 mask) { return read(weights + i, mask) * load(a + i); });
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
        const Lanes weight_of_row(weights[c]);
        map.template row<I>([&](int v, auto load) { map.sum[v] += weight_of_row * load(a + v * kLanes); });
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
      Lanes weights[4];
      for (int k = 0; k < 4; ++k) {
        weights[k] = Lanes(c + k < t.channels ? alpha[m * t.alpha_stride + c + k] : 0.0f);
      }
      float* row = out + m * t.out_stride;
      const int64_t live = t.channels - c < 4 ? t.channels - c : 4;
      each<I>(t.positions, [&](int64_t i, auto load, __mmask16 mask) {
        Lanes x = read(row + i, mask);
        if (live == 4) {
          for (int k = 0; k < 4; ++k) x += weights[k] * load(a[k] + i);
        } else {
          for (int64_t k = 0; k < live; ++k) x += weights[k] * load(a[k] + i);
        }
        write(row + i, mask, x);
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
      return pick<In<float32_tag>>(t, !first);
    case SHAPLEYCAM_FLOAT16:
      return pick<In<float16_tag>>(t, !first);
    case SHAPLEYCAM_BFLOAT16:
      return pick<In<bfloat16_tag>>(t, !first);
    default:
      return false;
  }
}

}  // namespace fast

inline void reduce_f32(const ReduceTask& t) {
  if (!fast::reduce(t)) reduce<float>(t);
}

inline void sum_f32(const SumTask& t) {
  if (!fast::sum(t)) sum<float>(t);
}

}  // namespace SHAPLEYCAM_ARCH
}  // namespace shapleycam
