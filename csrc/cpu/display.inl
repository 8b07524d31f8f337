// display_map and overlay for one image, compiled once per instruction set.
#pragma once

#include "../display.h"
#include "load.inl"

namespace shapleycam {
namespace SHAPLEYCAM_ARCH {

// The extent of a map, with NaN if any value is.
template <typename T>
struct Extent {
  T low, high;
  bool unknown = false;
  explicit Extent(T value) : low(value), high(value) {}
  void add(T x) {
    low = x < low ? x : low;
    high = x > high ? x : high;
    unknown |= !(x == x);
  }
  void settle() {
    if (unknown) low = high = static_cast<T>(__builtin_nan(""));
  }
};

inline uint16_t narrow_float16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 puts the result's bits at the end of the mantissa, rounded to nearest even.
    const float shifted = from_bits(magnitude) + from_bits(0x3f000000u);
    uint32_t rounded;
    __builtin_memcpy(&rounded, &shifted, 4);
    return static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

// Resizes along the rows at counts[0] x counts[1] x counts[2] positions, which position(axis, q) names, and hands every run of
// a row, of up to kBlock values, to body(offset, length, values).
template <typename T, typename Position, typename Body>
inline void resize(const T* raw, const Axis<T> (&axes)[3], T low, T divisor, const int64_t (&counts)[3], Position position,
                   Body body) {
  alignas(64) T raised[kBlock + 1], line[kBlock], weights[kBlock];
  int64_t cell[kBlock], start[kBlock + 1];
  const int64_t width = axes[2].from, plane = axes[1].from * width;
  for (int64_t x0 = 0; x0 < counts[2]; x0 += kBlock) {
    const int64_t length = counts[2] - x0 < kBlock ? counts[2] - x0 : kBlock;
    // Neighbouring positions read the same two values: a run of them is a loop without gathers.
    int64_t runs = 0;
    for (int64_t i = 0; i < length; ++i) {
      const Place<T> px = place(position(2, x0 + i), axes[2]);
      weights[i] = px.weight;
      if (runs == 0 || cell[runs - 1] != px.low) {
        cell[runs] = px.low;
        start[runs++] = i;
      }
    }
    start[runs] = length;
    for (int64_t z = 0; z < counts[0]; ++z) {
      const Place<T> pz = place(position(0, z), axes[0]);
      for (int64_t y = 0; y < counts[1]; ++y) {
        const Place<T> py = place(position(1, y), axes[1]);
        const T* r[4] = {raw + pz.low * plane + py.low * width, raw + pz.low * plane + py.high * width,
                         raw + pz.high * plane + py.low * width, raw + pz.high * plane + py.high * width};
        const bool flat = axes[0].from == 1;
        const auto at = [&](int64_t x) {
          const auto unit = [&](const T* row) { return unit_of(row[x], low, divisor); };
          const T near = between(unit(r[0]), unit(r[1]), py.weight);
          return flat ? near : between(near, between(unit(r[2]), unit(r[3]), py.weight), pz.weight);
        };
        const bool kept = width <= kBlock;
        if (kept) {
          for (int64_t x = 0; x < width; ++x) raised[x] = at(x);
          raised[width] = raised[width - 1];
        }
        for (int64_t run = 0; run < runs; ++run) {
          const int64_t c = cell[run], next = c + (c < width - 1 ? 1 : 0);
          const T a = kept ? raised[c] : at(c), b = kept ? raised[next] : at(next);
          for (int64_t i = start[run]; i < start[run + 1]; ++i) line[i] = between(a, b, weights[i]);
        }
        body((z * counts[1] + y) * counts[2] + x0, length, line);
      }
    }
  }
}

template <typename T>
void display(const DisplayTask& t) {
  const T* raw = static_cast<const T*>(t.raw);
  const int64_t count = t.from[0] * t.from[1] * t.from[2];
  Extent<T> extent(positive(raw[0]));
  for (int64_t i = 0; i < count; ++i) extent.add(positive(raw[i]));
  extent.settle();
  const Axis<T> axes[3] = {axis_of<T>(t.from[0], t.to[0]), axis_of<T>(t.from[1], t.to[1]), axis_of<T>(t.from[2], t.to[2])};
  const T low = extent.low, divisor = divisor_of(extent.low, extent.high);
  T low2 = 0, divisor2 = 1;
  if (t.renormalize) {
    int64_t some[3];
    for (int axis = 0; axis < 3; ++axis) some[axis] = extremes(axes[axis]);
    bool empty = true;
    Extent<T> all(0);
    const auto where = [&](int axis, int64_t q) { return extreme(q, axes[axis]); };
    resize(raw, axes, low, divisor, some, where, [&](int64_t, int64_t length, const T* line) {
      if (empty) all = Extent<T>(line[0]);
      empty = false;
      for (int64_t i = 0; i < length; ++i) all.add(line[i]);
    });
    all.settle();
    low2 = all.low;
    divisor2 = divisor_of(all.low, all.high);
  }
  const auto everywhere = [](int, int64_t q) { return q; };
  resize(raw, axes, low, divisor, t.to, everywhere, [&](int64_t offset, int64_t length, T* line) {
    if (t.renormalize) {
      for (int64_t i = 0; i < length; ++i) line[i] = renormalized(line[i], low2, divisor2);
    }
    if (t.out_dtype == SHAPLEYCAM_FLOAT16) {
      uint16_t* out = static_cast<uint16_t*>(t.out) + offset;
      for (int64_t i = 0; i < length; ++i) out[i] = narrow_float16(static_cast<float>(line[i]));
    } else if (t.out_dtype == SHAPLEYCAM_UINT8) {
      uint8_t* out = static_cast<uint8_t*>(t.out) + offset;
      for (int64_t i = 0; i < length; ++i) out[i] = byte_of(line[i]);
    } else {
      T* out = static_cast<T*>(t.out) + offset;
      for (int64_t i = 0; i < length; ++i) out[i] = line[i];
    }
  });
}

template <typename Element, typename Widen>
void overlay_image(const OverlayTask& t, const Element* image, Widen widen) {
  for (int64_t y = 0; y < t.height; ++y) {
    for (int64_t x = 0; x < t.width; ++x) {
      const float heat = t.heat[y * t.width + x];
      uint8_t* to = t.out + (y * t.width + x) * 3;
      if (!(heat - heat == 0.0f)) {
        mark_unknown(to);
        continue;
      }
      const uint8_t* colour = t.table + 3 * colour_of(heat);
      for (int64_t c = 0; c < 3; ++c) {
        const float base = widen(image[c * t.stride_c + y * t.stride_h + x * t.stride_w]) * t.scale[c] + t.shift[c];
        to[c] = blended(base, colour[c], t.alpha);
      }
    }
  }
}

inline void overlay(const OverlayTask& t) {
  switch (t.dtype) {
    case SHAPLEYCAM_UINT8:
      overlay_image(t, static_cast<const uint8_t*>(t.image), [](uint8_t x) { return static_cast<float>(x) / 255.0f; });
      break;
    case SHAPLEYCAM_FLOAT32:
      overlay_image(t, static_cast<const float*>(t.image), [](float x) { return x; });
      break;
    case SHAPLEYCAM_FLOAT64:
      overlay_image(t, static_cast<const double*>(t.image), [](double x) { return static_cast<float>(x); });
      break;
    case SHAPLEYCAM_FLOAT16:
      overlay_image(t, static_cast<const uint16_t*>(t.image), widen_float16);
      break;
    default:
      overlay_image(t, static_cast<const uint16_t*>(t.image), widen_bfloat16);
  }
}

}  // namespace SHAPLEYCAM_ARCH
}  // namespace shapleycam
