// exp(x) for x <= 0, which is what softmax asks for; compiled once per instruction set (included by utility.inl).

namespace shapleycam {
namespace SHAPLEYCAM_ARCH {

// In float32 without a call and without a branch, so that loops over it are vectorised, which those over the library's function
// are not. 2^y = 2^n 2^f with n the integer next to y = x log2(e), and 2^f by the polynomial that misses it least on
// [-1/2, 1/2], relatively (2e-9; in float32 1e-7). The error grows by 6e-8 |x| from the rounding of y: exp(-87) is right to
// 5e-6 of itself. What would be subnormal is 0. NaN stays NaN.
inline float exponential(float x) {
  constexpr float kLowest = -127.0f;
  const float wanted = x * 1.44269504f;
  const float y = wanted < kLowest ? kLowest : wanted;       // NaN stays, and spoils f
  const float number = wanted > kLowest ? wanted : kLowest;  // and becomes a number here, for the conversion
  const int32_t n = static_cast<int32_t>(number - 0.5f);     // towards zero, so the nearest; -127 makes the bits those of 0
  const float f = y - static_cast<float>(n);
  float power = 1.53458124e-4f;
  power = power * f + 1.33999309e-3f;
  power = power * f + 9.61848907e-3f;
  power = power * f + 5.55032864e-2f;
  power = power * f + 0.240226462f;
  power = power * f + 0.693147182f;
  power = power * f + 1.0f;
  return power * from_bits(static_cast<uint32_t>(n + 127) << 23);
}

inline double exponential(double x) { return __builtin_exp(x); }

}  // namespace SHAPLEYCAM_ARCH
}  // namespace shapleycam
