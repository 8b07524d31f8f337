// The display form of one map by several blocks: max(., 0), min-max, linear resize, min-max.
#pragma once

#include "../display.h"
#include "device.cuh"

namespace shapleycam {

// These two carry NaN along; fminf and fmaxf would drop it.
template <typename T>
__device__ __forceinline__ T lower(T a, T b) {
  return (a < b || a != a) ? a : b;
}

template <typename T>
__device__ __forceinline__ T higher(T a, T b) {
  return (a > b || a != a) ? a : b;
}

template <typename T>
struct Extent {
  T low, high;
  __device__ __forceinline__ void add(T x) {
    low = lower(x, low);
    high = higher(x, high);
  }
};

// Of nothing.
template <typename T>
__device__ __forceinline__ Extent<T> no_extent() {
  return {static_cast<T>(INFINITY), -static_cast<T>(INFINITY)};
}

// The extent over the block, for every thread.
template <typename T>
__device__ Extent<T> over_block(Extent<T> mine) {
  __shared__ T lows[kWarps], highs[kWarps];
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    mine.low = lower(__shfl_xor_sync(0xffffffffu, mine.low, lane), mine.low);
    mine.high = higher(__shfl_xor_sync(0xffffffffu, mine.high, lane), mine.high);
  }
  __syncthreads();  // the arrays may still be read from the call before
  if (threadIdx.x % 32 == 0) {
    lows[threadIdx.x / 32] = mine.low;
    highs[threadIdx.x / 32] = mine.high;
  }
  __syncthreads();
  Extent<T> all = {lows[0], highs[0]};
  for (int w = 1; w < kWarps; ++w) {
    all.low = lower(lows[w], all.low);
    all.high = higher(highs[w], all.high);
  }
  return all;
}

template <typename T>
using Line = Axis<T, int32_t>;

template <typename T>
using Spot = Place<T, int32_t>;

template <typename T>
struct Axes {
  Line<T> z, y, x;
};

template <typename T>
SHAPLEYCAM_ANYWHERE inline int32_t positions_of(const Axes<T>& axes) {
  return axes.z.from * axes.y.from * axes.x.from;
}

// Positions that may be extreme in the resized map, over all axes together.
template <typename T>
SHAPLEYCAM_ANYWHERE inline int32_t lines_of(const Axes<T>& axes) {
  return extremes(axes.z) + extremes(axes.y) + extremes(axes.x);
}

// unit(i) is position i of the map after max(., 0) and the first min-max.
template <typename T, typename Unit>
__device__ __forceinline__ T in_row(const Axes<T>& axes, const Unit& unit, int32_t row, const Spot<T>& x) {
  return between(unit(row * axes.x.from + x.low), unit(row * axes.x.from + x.high), x.weight);
}

template <typename T, typename Unit>
__device__ __forceinline__ T in_plane(const Axes<T>& axes, const Unit& unit, int32_t plane, const Spot<T>& y,
                                      const Spot<T>& x) {
  const int32_t first = plane * axes.y.from;
  return between(in_row(axes, unit, first + y.low, x), in_row(axes, unit, first + y.high, x), y.weight);
}

template <typename T, typename Unit>
__device__ __forceinline__ T resized(const Axes<T>& axes, const Unit& unit, const Spot<T>& z, const Spot<T>& y,
                                     const Spot<T>& x) {
  if (axes.z.from == 1) return in_plane(axes, unit, 0, y, x);
  return between(in_plane(axes, unit, z.low, y, x), in_plane(axes, unit, z.high, y, x), z.weight);
}

__device__ __forceinline__ void put(float* out, float x) { *out = x; }
__device__ __forceinline__ void put(double* out, double x) { *out = x; }
template <typename T>
__device__ __forceinline__ void put(Float16* out, T x) {
  out->bits = __half_as_ushort(__float2half_rn(static_cast<float>(x)));
}
template <typename T>
__device__ __forceinline__ void put(uint8_t* out, T x) {
  *out = byte_of(x);
}

// Neighbours of a row that are stored at once.
constexpr int kWide = 4;

template <typename Out, int kCount>
struct Neighbours {
  Out lane[kCount];
};

// As one store, of 4, 8 or 16 bytes, or two of them; `out` is aligned to them. By name, since nvcc takes a copied struct apart.
template <typename Out, int kCount>
constexpr int kStore = kCount * static_cast<int>(sizeof(Out)) < 16 ? kCount * static_cast<int>(sizeof(Out)) : 16;

template <typename Out, int kCount>
__device__ __forceinline__ void store(Out* out, const Neighbours<Out, kCount>& values) {
  constexpr int kSize = kCount * static_cast<int>(sizeof(Out));
  if constexpr (kCount == 1) {
    *out = values.lane[0];
  } else if constexpr (kSize % 16 == 0) {
    unsigned words[kSize / 4];
    memcpy(words, &values, kSize);
#pragma unroll
    for (int i = 0; i < kSize / 16; ++i) {
      const unsigned* w = words + 4 * i;
      __stwb(reinterpret_cast<uint4*>(out) + i, uint4{w[0], w[1], w[2], w[3]});
    }
  } else if constexpr (kSize == 8) {
    unsigned words[2];
    memcpy(words, &values, kSize);
    __stwb(reinterpret_cast<uint2*>(out), uint2{words[0], words[1]});
  } else {
    unsigned word;
    memcpy(&word, &values, kSize);
    __stwb(reinterpret_cast<unsigned*>(out), word);
  }
}

// How many threads of a block share a row, at `wide` positions each, and how many rows are under way at once.
SHAPLEYCAM_ANYWHERE inline int32_t rows_at_once(int32_t row, int32_t wide) {
  const int32_t sharing = row / wide;
  return sharing < kThreads ? kThreads / sharing : 1;
}

// Writes the rows [begin, end) of the resized map; a thread keeps its columns, so that a row costs one place and an output few
// instructions. `low` and `inverse` are those of the second min-max.
template <int kCount, typename T, typename Out, typename Unit>
__device__ __forceinline__ void write_rows(const Axes<T>& axes, const Unit& unit, bool renormalize, T low, T inverse,
                                           int32_t begin, int32_t end, Out* out) {
  const int32_t sharing = axes.x.to / kCount, groups = rows_at_once(axes.x.to, kCount);
  const int32_t thread = static_cast<int32_t>(threadIdx.x), group = groups > 1 ? thread / sharing : 0;
  if (group >= groups) return;
  for (int32_t v = thread - group * sharing; v < sharing; v += groups > 1 ? sharing : kThreads) {
    Spot<T> x[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) x[j] = place(v * kCount + j, axes.x);
    // Rows that lie between the same two of the map share what these have at the thread's columns.
    const bool flat = axes.z.from == 1;
    T upper[kCount] = {}, below[kCount] = {};
    int32_t between_rows = -1;
    for (int32_t row = begin + group; row < end; row += groups) {
      Spot<T> z = {0, 0, T(0)};
      int32_t iy = row;
      if (axes.z.to > 1) {
        const int32_t iz = row / axes.y.to;
        iy = row - iz * axes.y.to;
        z = place(iz, axes.z);
      }
      const Spot<T> y = place(iy, axes.y);
      if (flat && y.low != between_rows) {
        between_rows = y.low;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          upper[j] = in_row(axes, unit, y.low, x[j]);
          below[j] = in_row(axes, unit, y.high, x[j]);
        }
      }
      Neighbours<Out, kCount> values;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        T value = flat ? between(upper[j], below[j], y.weight) : resized(axes, unit, z, y, x[j]);
        if (renormalize) value = clamped((value - low) * inverse);
        put(values.lane + j, value);
      }
      store(out + static_cast<int64_t>(row) * axes.x.to + v * kCount, values);
    }
  }
}

template <typename T, typename Out, typename Unit>
__device__ __forceinline__ void write_any_rows(const Axes<T>& axes, const Unit& unit, bool renormalize, T low, T inverse,
                                               bool wide, int32_t begin, int32_t end, Out* out) {
  if (wide) {
    write_rows<kWide>(axes, unit, renormalize, low, inverse, begin, end, out);
  } else {
    write_rows<1>(axes, unit, renormalize, low, inverse, begin, end, out);
  }
}

}  // namespace shapleycam
