// The rows of shapleycam_pooling: what an element adds to the map, and how a channel's weight comes from its positions.
//
// T is a number, or a vector of them that has the operators and `choose`.
#pragma once

#include <stdint.h>

#include "anywhere.h"
#include "include/shapleycam.h"

namespace shapleycam {

// The row of the sum whose channel weights are given.
constexpr int kGiven = SHAPLEYCAM_PLUSPLUS + 1;

// Rows whose weight is one number per channel, which takes a sum over the positions first.
static constexpr bool pools(int32_t row) {
  return row == SHAPLEYCAM_MEAN || row == SHAPLEYCAM_ACTIVATION || row == SHAPLEYCAM_PLUSPLUS;
}

template <int kRow>
constexpr bool kPools = pools(kRow);

template <int kRow>
constexpr bool kPerChannel = kPools<kRow> || kRow == kGiven;

template <int kRow>
struct Row {
  static constexpr int value = kRow;
};

// A layout is channels last only if its channels are the closer neighbours; a single position has no layout.
static inline bool channels_last(const shapleycam_view* a) { return a->stride_c == 1 && a->stride_s != 1; }

// Calls body(Row<row>{}). Whoever comes here has had the row checked.
template <typename Body>
static inline auto with_row(int32_t row, Body body) {
  switch (row) {
    case SHAPLEYCAM_MEAN:
      return body(Row<SHAPLEYCAM_MEAN>{});
    case SHAPLEYCAM_ELEMENTWISE:
      return body(Row<SHAPLEYCAM_ELEMENTWISE>{});
    case SHAPLEYCAM_ELEMENTWISE_RELU:
      return body(Row<SHAPLEYCAM_ELEMENTWISE_RELU>{});
    case SHAPLEYCAM_ACTIVATION:
      return body(Row<SHAPLEYCAM_ACTIVATION>{});
    case SHAPLEYCAM_POSITIVE_GRADIENT:
      return body(Row<SHAPLEYCAM_POSITIVE_GRADIENT>{});
    case SHAPLEYCAM_PLUSPLUS:
      return body(Row<SHAPLEYCAM_PLUSPLUS>{});
    default:
      return body(Row<kGiven>{});
  }
}

// w = g - H A / 2.
template <typename T>
SHAPLEYCAM_ANYWHERE static inline T weight(T g, T h) {
  return g - T(0.5) * h;
}

// What an element adds to the map, in the rows that are not per channel.
template <int kRow, typename T>
SHAPLEYCAM_ANYWHERE static inline T term(T w, T x) {
  if constexpr (kRow == SHAPLEYCAM_ELEMENTWISE_RELU) return positive(w * x);
  if constexpr (kRow == SHAPLEYCAM_POSITIVE_GRADIENT) return positive(w) * x;
  return w * x;
}

template <typename T>
SHAPLEYCAM_ANYWHERE static inline T plusplus_term(T w, T activations) {
  const T square = w * w;
  const T ratio = square / (T(2) * square + square * w * activations + T(1e-6));
  return choose(w == T(0), T(0), [&] { return positive(w) * ratio; });
}

// Adds one position, of weight w and activation x, to the channel's sums. For "plusplus", `activations` is the whole sum of
// them, found before; the others need no x but for "activation".
template <int kRow, typename T>
SHAPLEYCAM_ANYWHERE static inline void pool(T w, T x, T& sum, T& activations) {
  if constexpr (kRow == SHAPLEYCAM_PLUSPLUS) {
    sum += plusplus_term(w, activations);
  } else if constexpr (kRow == SHAPLEYCAM_ACTIVATION) {
    sum += w * x;
    activations += x;
  } else {
    sum += w;
  }
}

// The channel's weight from its sums.
template <int kRow, typename T>
SHAPLEYCAM_ANYWHERE static inline T channel_weight(T sum, T activations, int64_t positions) {
  if constexpr (kRow == SHAPLEYCAM_MEAN) return sum / static_cast<T>(positions);
  if constexpr (kRow == SHAPLEYCAM_ACTIVATION) return sum / (activations + T(1e-7));
  return sum;
}

}  // namespace shapleycam
