// The display form of one map by one block or several: max(., 0), min-max, linear resize, min-max.
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
struct Map {
  const T* raw;
  Axis<T> z, y, x;
  T low, divisor;

  __device__ __forceinline__ T unit(int64_t i) const { return unit_of(raw[i], low, divisor); }

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
  *out = byte_of(x);
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
  map.divisor = divisor_of(extent.low, extent.high);
  T low = 0, divisor = 1;
  if (renormalize) {
    const int64_t ex = extremes(map.x), ey = extremes(map.y), candidates = ex * ey * extremes(map.z);
    const T corner = map.at(0, 0, 0);
    extent = {corner, corner};
    for (int64_t i = threadIdx.x; i < candidates; i += kThreads) {
      extent.add(map.at(extreme(i / (ex * ey), map.z), extreme(i / ex % ey, map.y), extreme(i % ex, map.x)));
    }
    extent = over_block(extent);
    low = extent.low;
    divisor = divisor_of(extent.low, extent.high);
  }
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    T value = map.at(i / (map.x.to * map.y.to), i / map.x.to % map.y.to, i % map.x.to);
    if (renormalize) value = renormalized(value, low, divisor);
    put(out + i, value);
  }
}

}  // namespace shapleycam
