// weighted_reduce and channel_weighted_sum of one task, written for the compiler's vectoriser and compiled once per instruction
// set.
//
// Included with SHAPLEYCAM_ARCH set to a namespace of its own. Nothing here may instantiate a template of the standard library:
// the linker could then hand code compiled for AVX-512 to a machine without it.
#pragma once

#include "../pooling.h"
#include "load.inl"

namespace shapleycam {
namespace SHAPLEYCAM_ARCH {

// Positions whose terms are added in float32 before the sum is put by in float64: each rounds what the sum has become, so that
// 12544 equal terms, added one to the other, were seen to be off by 1e-4 of it.
constexpr int64_t kTogether = 128;

// After position s: puts the parts by where they are long enough, and leaves the whole sums in them after the last.
template <typename T>
inline void put_by(int64_t s, int64_t positions, T* part, double* whole, int64_t count) {
  const bool last = s == positions - 1;
  if (positions <= kTogether || (s % kTogether != kTogether - 1 && !last)) return;
  if (s < kTogether) {
    for (int64_t i = 0; i < count; ++i) whole[i] = part[i];
  } else {
    for (int64_t i = 0; i < count; ++i) whole[i] += part[i];
  }
  for (int64_t i = 0; i < count; ++i) part[i] = last ? static_cast<T>(whole[i]) : T(0);
}

// Calls body(Row<row>{}) in the rows that pool.
template <typename Body>
inline void with_pooling_row(int32_t row, Body body) {
  if (row == SHAPLEYCAM_MEAN) return body(Row<SHAPLEYCAM_MEAN>{});
  if (row == SHAPLEYCAM_ACTIVATION) return body(Row<SHAPLEYCAM_ACTIVATION>{});
  body(Row<SHAPLEYCAM_PLUSPLUS>{});
}

// Calls body(Row<row>{}), with kGiven for all rows whose weight is one number per channel: once it is known they are alike.
template <typename Body>
inline void with_map_row(int32_t row, Body body) {
  if (row == SHAPLEYCAM_ELEMENTWISE) return body(Row<SHAPLEYCAM_ELEMENTWISE>{});
  if (row == SHAPLEYCAM_ELEMENTWISE_RELU) return body(Row<SHAPLEYCAM_ELEMENTWISE_RELU>{});
  if (row == SHAPLEYCAM_POSITIVE_GRADIENT) return body(Row<SHAPLEYCAM_POSITIVE_GRADIENT>{});
  body(Row<kGiven>{});
}

// Adds one run of positions to the sums of one channel. Without a Hessian-vector product `h` points at zeros, here and below,
// so that every row has one loop. `a` is read in "activation" only.
template <typename T>
inline void pool_positions(int32_t row, const T* a, const T* g, const T* h, int64_t count, T& sum, T& activations) {
  with_pooling_row(row, [&](auto which) {
    constexpr int kRow = decltype(which)::value;
    constexpr bool kSums = kRow == SHAPLEYCAM_ACTIVATION;
    T part = 0, part_of_a = kSums ? T(0) : activations;
    for (int64_t i = 0; i < count; ++i) pool<kRow>(weight(g[i], h[i]), kSums ? a[i] : T(0), part, part_of_a);
    sum += part;
    if (kSums) activations += part_of_a;
  });
}

// Adds one position to the sums of a run of channels.
template <typename T>
inline void pool_channels(int32_t row, const T* a, const T* g, const T* h, int64_t count, T* sum, T* activations) {
  with_pooling_row(row, [&](auto which) {
    constexpr int kRow = decltype(which)::value;
    for (int64_t i = 0; i < count; ++i) {
      pool<kRow>(weight(g[i], h[i]), kRow == SHAPLEYCAM_ACTIVATION ? a[i] : T(0), sum[i], activations[i]);
    }
  });
}

// Adds one run of positions of one channel, whose weight is known in the rows that have one, to the map.
template <typename T>
inline void accumulate(int32_t row, T* out, const T* a, const T* g, const T* h, T alpha, int64_t count) {
  with_map_row(row, [&](auto which) {
    constexpr int kRow = decltype(which)::value;
    if constexpr (kRow == kGiven) {
      for (int64_t i = 0; i < count; ++i) out[i] += alpha * a[i];
    } else {
      for (int64_t i = 0; i < count; ++i) out[i] += term<kRow>(weight(g[i], h[i]), a[i]);
    }
  });
}

// The map's value at one position from a run of channels.
template <typename T>
inline T dot(int32_t row, const T* a, const T* g, const T* h, const T* alpha, int64_t count) {
  T sum = 0;
  with_map_row(row, [&](auto which) {
    constexpr int kRow = decltype(which)::value;
    if constexpr (kRow == kGiven) {
      for (int64_t i = 0; i < count; ++i) sum += alpha[i] * a[i];
    } else {
      for (int64_t i = 0; i < count; ++i) sum += term<kRow>(weight(g[i], h[i]), a[i]);
    }
  });
  return sum;
}

template <typename T>
struct Scratch {
  alignas(64) T a[kBlock], g[kBlock], h[kBlock], zeros[kBlock];
};

template <typename T>
inline const T* load_h(const ReduceTask& t, int64_t offset, int64_t count, int64_t stride, Scratch<T>& scratch) {
  return t.h.data == nullptr ? scratch.zeros : load(t.h, offset, count, stride, scratch.h);
}

// The weights of channels in the place of their sums.
template <typename T>
inline void channel_weights(int32_t row, T* sums, const T* activations, int64_t positions, int64_t count) {
  with_pooling_row(row, [&](auto which) {
    constexpr int kRow = decltype(which)::value;
    constexpr bool kSums = kRow == SHAPLEYCAM_ACTIVATION;
    for (int64_t i = 0; i < count; ++i) sums[i] = channel_weight<kRow>(sums[i], kSums ? activations[i] : T(0), positions);
  });
}

// Channels first: one channel after the other, each a run of positions.
template <typename T>
void reduce_channels_first(const ReduceTask& t, Scratch<T>& scratch) {
  T* out = static_cast<T*>(t.out);
  const int64_t positions = t.positions;
  const bool pooled = pools(t.pooling), reads_a = t.pooling == SHAPLEYCAM_ACTIVATION;
  const auto every_run = [&](auto body) {
    for (int64_t s = 0; s < positions; s += kBlock) body(s, positions - s < kBlock ? positions - s : kBlock);
  };
  for (int64_t c = t.first; c < t.first + t.channels; ++c) {
    const int64_t oa = t.image * t.a.stride_n + c * t.a.stride_c;
    const int64_t og = t.image * t.g.stride_n + c * t.g.stride_c;
    const int64_t oh = t.image * t.h.stride_n + c * t.h.stride_c;
    const auto at_a = [&](int64_t s, int64_t k) { return load(t.a, oa + s * t.a.stride_s, k, t.a.stride_s, scratch.a); };
    const auto at_g = [&](int64_t s, int64_t k) { return load(t.g, og + s * t.g.stride_s, k, t.g.stride_s, scratch.g); };
    const auto at_h = [&](int64_t s, int64_t k) { return load_h(t, oh + s * t.h.stride_s, k, t.h.stride_s, scratch); };
    T alpha = 0;
    if (pooled) {
      T activations = 0;
      if (t.pooling == SHAPLEYCAM_PLUSPLUS) {
        every_run([&](int64_t s, int64_t k) {
          const T* a = at_a(s, k);
          T part = 0;
          for (int64_t i = 0; i < k; ++i) part += a[i];
          activations += part;
        });
      }
      every_run([&](int64_t s, int64_t k) {
        const T *g = at_g(s, k), *h = at_h(s, k);
        pool_positions(t.pooling, reads_a ? at_a(s, k) : g, g, h, k, alpha, activations);
      });
      channel_weights(t.pooling, &alpha, &activations, positions, 1);
    }
    every_run([&](int64_t s, int64_t k) {
      const T* a = at_a(s, k);
      accumulate(t.pooling, out + s, a, pooled ? a : at_g(s, k), pooled ? a : at_h(s, k), alpha, k);
    });
  }
}

// Channels last: one position after the other, each a run of channels.
template <typename T>
void reduce_channels_last(const ReduceTask& t, Scratch<T>& scratch) {
  alignas(64) T alpha[kBlock], activations[kBlock];
  T* out = static_cast<T*>(t.out);
  const int64_t k = t.channels, positions = t.positions;
  const int64_t oa = t.image * t.a.stride_n + t.first * t.a.stride_c;
  const int64_t og = t.image * t.g.stride_n + t.first * t.g.stride_c;
  const int64_t oh = t.image * t.h.stride_n + t.first * t.h.stride_c;
  const auto at_a = [&](int64_t s) { return load(t.a, oa + s * t.a.stride_s, k, t.a.stride_c, scratch.a); };
  const auto at_g = [&](int64_t s) { return load(t.g, og + s * t.g.stride_s, k, t.g.stride_c, scratch.g); };
  const auto at_h = [&](int64_t s) { return load_h(t, oh + s * t.h.stride_s, k, t.h.stride_c, scratch); };
  const bool pooled = pools(t.pooling), reads_a = t.pooling == SHAPLEYCAM_ACTIVATION;
  if (pooled) {
    alignas(64) double whole[kBlock], whole_of_a[kBlock];
    for (int64_t i = 0; i < k; ++i) alpha[i] = activations[i] = 0;
    if (t.pooling == SHAPLEYCAM_PLUSPLUS) {
      for (int64_t s = 0; s < positions; ++s) {
        const T* a = at_a(s);
        for (int64_t i = 0; i < k; ++i) activations[i] += a[i];
        put_by(s, positions, activations, whole_of_a, k);
      }
    }
    for (int64_t s = 0; s < positions; ++s) {
      const T *g = at_g(s), *h = at_h(s);
      pool_channels(t.pooling, reads_a ? at_a(s) : g, g, h, k, alpha, activations);
      put_by(s, positions, alpha, whole, k);
      if (reads_a) put_by(s, positions, activations, whole_of_a, k);
    }
    channel_weights(t.pooling, alpha, activations, positions, k);
  }
  for (int64_t s = 0; s < positions; ++s) {
    const T* a = at_a(s);
    out[s] = dot(t.pooling, a, pooled ? a : at_g(s), pooled ? a : at_h(s), alpha, k);
  }
}

template <typename T>
void reduce(const ReduceTask& t) {
  Scratch<T> scratch;
  if (t.h.data == nullptr) {
    for (int64_t i = 0; i < kBlock; ++i) scratch.zeros[i] = 0;
  }
  if (channels_last(&t.a)) {
    reduce_channels_last(t, scratch);
    return;
  }
  for (int64_t s = 0; s < t.positions; ++s) static_cast<T*>(t.out)[s] = 0;
  reduce_channels_first(t, scratch);
}

template <typename T>
void sum(const SumTask& t) {
  alignas(64) T scratch[kBlock];
  T* out = static_cast<T*>(t.out);
  const T* alpha = static_cast<const T*>(t.alpha);
  const int64_t base = t.image * t.a.stride_n + t.first * t.a.stride_c;
  if (channels_last(&t.a)) {
    for (int64_t s = 0; s < t.positions; ++s) {
      const T* a = load(t.a, base + s * t.a.stride_s, t.channels, 1, scratch);
      for (int64_t m = 0; m < t.rows; ++m) {
        out[m * t.out_stride + s] = dot<T>(kGiven, a, a, a, alpha + m * t.alpha_stride, t.channels);
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
