// The weights of the logits for one image, compiled once per instruction set (included by kernels.inl).

#include "exponential.inl"
#include "quadrature.inl"

namespace shapleycam {
namespace SHAPLEYCAM_ARCH {

template <typename T>
void utility_rows(const RowsTask& t) {
  if (t.nodes_count > 0) return quadrature_rows<T>(t);
  alignas(64) T z_scratch[kBlock], b_scratch[kBlock];
  const T unknown = static_cast<T>(__builtin_nan("")), factor = static_cast<T>(t.scale);
  T* rows = static_cast<T*>(t.rows);
  T* p = rows;  // the first row holds p until it is that row's turn, which is last
  const auto every_block = [&](auto body) {
    for (int64_t i = 0; i < t.k; i += kBlock) {
      const int64_t count = t.k - i < kBlock ? t.k - i : kBlock;
      const T* z = load(t.logits, i, count, 1, z_scratch);
      const T* b = t.bias.data == nullptr ? nullptr : load(t.bias, i, count, 1, b_scratch);
      body(i, count, z, b);
    }
  };
  T s = 0;
  if (t.utility != SHAPLEYCAM_LOGIT) {
    T most = 0, total = 0;
    bool first = true, known = true;
    every_block([&](int64_t, int64_t count, const T* z, const T*) {
      if (first) most = z[0];
      first = false;
      for (int64_t j = 0; j < count; ++j) {
        most = z[j] > most ? z[j] : most;
        known &= z[j] == z[j];
      }
    });
    if (!known) most = unknown;
    every_block([&](int64_t i, int64_t count, const T* z, const T*) {
      for (int64_t j = 0; j < count; ++j) p[i + j] = exponential(z[j] - most);
      for (int64_t j = 0; j < count; ++j) total += p[i + j];
    });
    every_block([&](int64_t i, int64_t count, const T* z, const T* b) {
      for (int64_t j = 0; j < count; ++j) p[i + j] /= total;
      if (b == nullptr) {
        for (int64_t j = 0; j < count; ++j) s += p[i + j] * z[j];
      } else {
        for (int64_t j = 0; j < count; ++j) s += p[i + j] * (z[j] - b[j]);
      }
    });
  }
  for (int64_t m = t.m - 1; m >= 0; --m) {
    T* row = rows + m * t.k;
    const int64_t c = t.targets[m];
    if (c < 0 || c >= t.k) {
      for (int64_t j = 0; j < t.k; ++j) row[j] = unknown;
      continue;
    }
    const T z0_c = *load(t.logits, c, 1, 1, z_scratch) - (t.bias.data == nullptr ? T(0) : *load(t.bias, c, 1, 1, b_scratch));
    const Coefficients<T> on = coefficients<T>(t.utility, t.order, t.utility == SHAPLEYCAM_LOGIT ? T(0) : p[c], z0_c, s);
    if (t.utility == SHAPLEYCAM_LOGIT) {
      for (int64_t j = 0; j < t.k; ++j) row[j] = 0;
    } else if (t.order == 1) {
      for (int64_t j = 0; j < t.k; ++j) row[j] = factor * (on.on_p * p[j]);
    } else {
      every_block([&](int64_t i, int64_t count, const T* z, const T* b) {
        for (int64_t j = 0; j < count; ++j) {
          const T z0 = b == nullptr ? z[j] : z[j] - b[j];
          row[i + j] = factor * (on.on_p * p[i + j] + on.on_pz * (p[i + j] * z0));
        }
      });
    }
    row[c] += factor * on.on_class;
  }
}

}  // namespace SHAPLEYCAM_ARCH
}  // namespace shapleycam
