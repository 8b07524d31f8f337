// The display form of one map by one block or several: max(., 0), min-max, linear resize, min-max.
//
// The second min-max needs the extent of the resized map before any of it can be written. Between two neighbours of the raw map
// the resized one is linear along every axis, so on the positions that fall between them it is extreme at the first or the
// last: some (2 from)^2 positions tell the extent of to^2.
#pragma once

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
  __device__ void add(T x) {
    low = lower(x, low);
    high = higher(x, high);
  }
};

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
struct Axis {
  int64_t from, to;
  T scale;
};

template <typename T>
struct Place {
  int64_t low, high;
  T weight;
};

template <typename T>
__device__ __forceinline__ Place<T> place(int64_t i, const Axis<T>& axis) {
  T x = axis.scale * (static_cast<T>(i) + T(0.5)) - T(0.5);
  x = x < T(0) ? T(0) : x;
  int64_t low = static_cast<int64_t>(x);
  low = low < axis.from - 1 ? low : axis.from - 1;
  return {low, low + (low < axis.from - 1 ? 1 : 0), x - static_cast<T>(low)};
}

// The first position that reads at or beyond `low`, or axis.to.
template <typename T>
__device__ int64_t first_reaching(int64_t low, const Axis<T>& axis) {
  if (low >= axis.from) return axis.to;
  int64_t i = static_cast<int64_t>((static_cast<T>(low) + T(0.5)) / axis.scale - T(0.5));
  i = i < 0 ? 0 : (i < axis.to ? i : axis.to);
  // Rounding may have put the guess off by a step.
  while (i > 0 && place(i - 1, axis).low >= low) --i;
  while (i < axis.to && place(i, axis).low < low) ++i;
  return i;
}

// How many positions of an axis can be extreme, and which.
template <typename T>
__host__ __device__ __forceinline__ int64_t extremes(const Axis<T>& axis) {
  return 2 * axis.from < axis.to ? 2 * axis.from : axis.to;
}

template <typename T>
__device__ int64_t extreme(int64_t q, const Axis<T>& axis) {
  if (extremes(axis) == axis.to) return q;
  const int64_t i = first_reaching(q / 2 + q % 2, axis) - q % 2;
  return i < 0 ? 0 : (i < axis.to ? i : axis.to - 1);
}

template <typename T>
__device__ __forceinline__ T between(T a, T b, T weight) {
  return (T(1) - weight) * a + weight * b;
}

template <typename T>
struct Map {
  const T* raw;
  Axis<T> z, y, x;
  T low, scale;

  __device__ __forceinline__ T unit(int64_t i) const { return (positive(raw[i]) - low) / scale; }

  __device__ T plane(int64_t pz, const Place<T>& py, const Place<T>& px) const {
    const int64_t upper = (pz * y.from + py.low) * x.from, below = (pz * y.from + py.high) * x.from;
    return between(between(unit(upper + px.low), unit(upper + px.high), px.weight),
                   between(unit(below + px.low), unit(below + px.high), px.weight), py.weight);
  }

  __device__ T at(int64_t iz, int64_t iy, int64_t ix) const {
    const Place<T> px = place(ix, x), py = place(iy, y);
    if (z.from == 1) return plane(0, py, px);
    const Place<T> pz = place(iz, z);
    return between(plane(pz.low, py, px), plane(pz.high, py, px), pz.weight);
  }
};

__device__ __forceinline__ void put(float* out, float x) { *out = x; }
__device__ __forceinline__ void put(double* out, double x) { *out = x; }
template <typename T>
__device__ __forceinline__ void put(Float16* out, T x) {
  out->bits = __half_as_ushort(__float2half_rn(static_cast<float>(x)));
}
template <typename T>
__device__ __forceinline__ void put(uint8_t* out, T x) {
  const T scaled = x > T(0) ? x * T(255) : T(0);  // NaN becomes 0: a byte cannot say it
  *out = static_cast<uint8_t>(rint(scaled < T(255) ? scaled : T(255)));
}

// Writes the positions [begin, end) of the display form of map.raw; every thread of the block must call it.
template <typename T, typename Out>
__device__ void display_part(Map<T> map, bool renormalize, int64_t begin, int64_t end, Out* out) {
  const int64_t count = map.z.from * map.y.from * map.x.from;
  const T first = positive(map.raw[0]);
  Extent<T> extent = {first, first};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) extent.add(positive(map.raw[i]));
  extent = over_block(extent);
  map.low = extent.low;
  map.scale = T(1e-7) + (extent.high - extent.low);
  T low = 0, scale = 1;
  if (renormalize) {
    const int64_t ex = extremes(map.x), ey = extremes(map.y), candidates = ex * ey * extremes(map.z);
    const T corner = map.at(0, 0, 0);
    extent = {corner, corner};
    for (int64_t i = threadIdx.x; i < candidates; i += kThreads) {
      extent.add(map.at(extreme(i / (ex * ey), map.z), extreme(i / ex % ey, map.y), extreme(i % ex, map.x)));
    }
    extent = over_block(extent);
    low = extent.low;
    scale = T(1e-7) + (extent.high - extent.low);
  }
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    T value = map.at(i / (map.x.to * map.y.to), i / map.x.to % map.y.to, i % map.x.to);
    if (renormalize) {
      // Rounding may carry a value a step beyond the extremes; NaN stays.
      value = (value - low) / scale;
      value = value < T(0) ? T(0) : (value > T(1) ? T(1) : value);
    }
    put(out + i, value);
  }
}

template <typename T>
Axis<T> axis_of(int64_t from, int64_t to) {
  return {from, to, static_cast<T>(from) / static_cast<T>(to)};
}

}  // namespace shapleycam
