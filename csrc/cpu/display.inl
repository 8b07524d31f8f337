// display_map and overlay for one image, compiled once per instruction set (included by rows.inl).

namespace shapleycam {
namespace SHAPLEYCAM_ARCH {

// Half-pixel centres: where output position i of an axis reads, and how far between its two neighbours.
template <typename T>
struct Place {
  int64_t low, high;
  T weight;
};

template <typename T>
inline Place<T> place(int64_t i, int64_t from, int64_t to) {
  const T scale = static_cast<T>(from) / static_cast<T>(to);
  T x = scale * (static_cast<T>(i) + T(0.5)) - T(0.5);
  if (x < T(0)) x = T(0);
  int64_t low = static_cast<int64_t>(x);
  if (low > from - 1) low = from - 1;
  return {low, low + (low < from - 1 ? 1 : 0), x - static_cast<T>(low)};
}

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

// The volatile keeps the compiler, which may reassociate here, from (1e-7 + high) - low: that is 0 for a constant map.
template <typename T>
inline T divisor_of(const Extent<T>& extent) {
  const volatile T range = extent.high - extent.low;
  return T(1e-7) + range;
}

template <typename T>
inline T between(T a, T b, T weight) {
  return (T(1) - weight) * a + weight * b;
}

// Writes one row of the resized map to emit(x, value).
template <typename T, typename Emit>
inline void resized_row(const DisplayTask& t, const T* raw, T low, T scale, int64_t z, int64_t y, T* tmp, Emit emit) {
  const int64_t width = t.from[2], plane = t.from[1] * width;
  const Place<T> pz = place<T>(z, t.from[0], t.to[0]), py = place<T>(y, t.from[1], t.to[1]);
  const T* r[4] = {raw + pz.low * plane + py.low * width, raw + pz.low * plane + py.high * width,
                   raw + pz.high * plane + py.low * width, raw + pz.high * plane + py.high * width};
  const bool flat = t.from[0] == 1;
  const auto at = [&](int64_t x) {
    const auto unit = [&](const T* row) { return (positive(row[x]) - low) / scale; };
    const T near = between(unit(r[0]), unit(r[1]), py.weight);
    return flat ? near : between(near, between(unit(r[2]), unit(r[3]), py.weight), pz.weight);
  };
  if (width <= kBlock) {
    for (int64_t x = 0; x < width; ++x) tmp[x] = at(x);
    for (int64_t x = 0; x < t.to[2]; ++x) {
      const Place<T> px = place<T>(x, width, t.to[2]);
      emit(x, between(tmp[px.low], tmp[px.high], px.weight));
    }
    return;
  }
  for (int64_t x = 0; x < t.to[2]; ++x) {
    const Place<T> px = place<T>(x, width, t.to[2]);
    emit(x, between(at(px.low), at(px.high), px.weight));
  }
}

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

template <typename T>
void display(const DisplayTask& t) {
  alignas(64) T tmp[kBlock];
  const T* raw = static_cast<const T*>(t.raw);
  const int64_t count = t.from[0] * t.from[1] * t.from[2], row = t.to[2];
  Extent<T> extent(positive(raw[0]));
  for (int64_t i = 0; i < count; ++i) extent.add(positive(raw[i]));
  extent.settle();
  const T low = extent.low, scale = divisor_of(extent);
  const auto every_row = [&](auto body) {
    for (int64_t z = 0; z < t.to[0]; ++z) {
      for (int64_t y = 0; y < t.to[1]; ++y) body((z * t.to[1] + y) * row, z, y);
    }
  };
  T low2 = 0, scale2 = 1;
  const bool direct = t.out_dtype == (sizeof(T) == 8 ? SHAPLEYCAM_FLOAT64 : SHAPLEYCAM_FLOAT32);
  T* out = static_cast<T*>(t.out);
  if (t.renormalize) {
    T first = 0;
    resized_row(t, raw, low, scale, 0, 0, tmp, [&](int64_t x, T value) { first = x == 0 ? value : first; });
    Extent<T> all(first);
    every_row([&](int64_t at, int64_t z, int64_t y) {
      resized_row(t, raw, low, scale, z, y, tmp, [&](int64_t x, T value) {
        all.add(value);
        if (direct) out[at + x] = value;
      });
    });
    all.settle();
    low2 = all.low;
    scale2 = divisor_of(all);
    if (direct) {
      for (int64_t i = 0; i < t.to[0] * t.to[1] * row; ++i) out[i] = (out[i] - low2) / scale2;
      return;
    }
  }
  every_row([&](int64_t at, int64_t z, int64_t y) {
    resized_row(t, raw, low, scale, z, y, tmp, [&](int64_t x, T value) {
      const T last = t.renormalize ? (value - low2) / scale2 : value;
      if (direct) {
        out[at + x] = last;
      } else if (t.out_dtype == SHAPLEYCAM_FLOAT16) {
        static_cast<uint16_t*>(t.out)[at + x] = narrow_float16(static_cast<float>(last));
      } else {
        // NaN becomes 0: a byte cannot say it.
        const T scaled = last > T(0) ? last * T(255) : T(0);
        static_cast<uint8_t*>(t.out)[at + x] = static_cast<uint8_t>(__builtin_rint(scaled < T(255) ? scaled : T(255)));
      }
    });
  });
}

template <typename Element, typename Widen>
void overlay_image(const OverlayTask& t, const Element* image, Widen widen) {
  const float keep = 1.0f - t.alpha;
  for (int64_t y = 0; y < t.height; ++y) {
    for (int64_t x = 0; x < t.width; ++x) {
      const float heat = t.heat[y * t.width + x];
      uint8_t* to = t.out + (y * t.width + x) * 3;
      if (!(heat - heat == 0.0f)) {
        to[0] = 255;
        to[1] = 0;
        to[2] = 255;
        continue;
      }
      const float unit = heat < 0.0f ? 0.0f : (heat > 1.0f ? 1.0f : heat);
      const uint8_t* colour = t.table + 3 * static_cast<int64_t>(__builtin_rintf(unit * 255.0f));
      for (int64_t c = 0; c < 3; ++c) {
        float base = widen(image[c * t.stride_c + y * t.stride_h + x * t.stride_w]) * t.scale[c] + t.shift[c];
        base = base < 0.0f ? 0.0f : (base > 1.0f ? 1.0f : base);
        const float mixed = (keep * base + t.alpha * (static_cast<float>(colour[c]) / 255.0f)) * 255.0f;
        to[c] = mixed > 0.0f ? static_cast<uint8_t>(__builtin_rintf(mixed < 255.0f ? mixed : 255.0f)) : 0;
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
