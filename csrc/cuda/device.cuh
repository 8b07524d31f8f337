// What every kernel needs: element types, strided loads, 16-byte loads, and warp sums.
#pragma once

#include <cuda_fp16.h>

#include <initializer_list>

#include "../pooling.h"
#include "launch.h"

namespace shapleycam {

// Halves are carried as their bits, so that a pack of them is a plain 16 bytes.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float widen(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

struct View {
  const void* data;
  int64_t stride_n, stride_c, stride_s;
  int32_t dtype;
};

inline View view_of(const shapleycam_view* v) {
  return v == nullptr ? View{nullptr, 0, 0, 0, SHAPLEYCAM_FLOAT32}
                      : View{v->data, v->stride_n, v->stride_c, v->stride_s, v->dtype};
}

template <typename T>
__device__ __forceinline__ T load(const void* data, int32_t dtype, int64_t offset) {
  // The branch is uniform over the launch.
  switch (dtype) {
    case SHAPLEYCAM_FLOAT32:
      return static_cast<T>(static_cast<const float*>(data)[offset]);
    case SHAPLEYCAM_FLOAT64:
      return static_cast<T>(static_cast<const double*>(data)[offset]);
    case SHAPLEYCAM_FLOAT16:
      return static_cast<T>(widen(static_cast<const Float16*>(data)[offset]));
    default:
      return static_cast<T>(widen(static_cast<const BFloat16*>(data)[offset]));
  }
}

template <typename T>
__device__ __forceinline__ T at(const View& a, int64_t n, int64_t c, int64_t s) {
  return load<T>(a.data, a.dtype, n * a.stride_n + c * a.stride_c + s * a.stride_s);
}

// 16 bytes of one element type.
template <typename E>
constexpr int kPack = 16 / static_cast<int>(sizeof(E));

template <typename E>
struct Pack {
  E lane[kPack<E>];
};

template <typename E>
__device__ __forceinline__ Pack<E> fetch(const E* aligned) {
  const uint4 bits = __ldg(reinterpret_cast<const uint4*>(aligned));
  Pack<E> pack;
  memcpy(&pack, &bits, sizeof(pack));
  return pack;
}

// The same, where it stands: nvcc moves an ordinary load to where its value is used, behind the use of the one before, and then
// one load is under way instead of all.
template <typename E>
__device__ __forceinline__ Pack<E> fetch_here(const E* aligned) {
#if defined(__CUDACC__)
  uint4 bits;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(__cvta_generic_to_global(aligned)));
  Pack<E> pack;
  memcpy(&pack, &bits, sizeof(pack));
  return pack;
#else
  return fetch(aligned);
#endif
}

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

}  // namespace shapleycam
