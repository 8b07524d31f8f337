// The weights of the logits for one image by a quadrature rule, compiled once per instruction set (included by utility.inl).

namespace shapleycam {
namespace SHAPLEYCAM_ARCH {

constexpr int64_t kExponentials = 8192;  // of one image that are kept at a time

// The largest of x, at least `most`. NaN is passed over: the exponentials bring it back.
template <typename T>
inline T highest(const T* x, int64_t count, T most) {
  constexpr int kLanes = 64 / static_cast<int>(sizeof(T));
  T lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = most;
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] = x[j + l] > lanes[l] ? x[j + l] : lanes[l];
  }
  for (; j < count; ++j) lanes[0] = x[j] > lanes[0] ? x[j] : lanes[0];
  for (int l = 0; l < kLanes; ++l) most = lanes[l] > most ? lanes[l] : most;
  return most;
}

template <typename T>
void quadrature_rows(const RowsTask& t) {
  alignas(64) T z_scratch[kBlock], s_scratch[kBlock], kept[kExponentials];
  T to_z[SHAPLEYCAM_MOST_NODES], to_start[SHAPLEYCAM_MOST_NODES], top[SHAPLEYCAM_MOST_NODES], total[SHAPLEYCAM_MOST_NODES];
  const T nothing = -static_cast<T>(__builtin_inf()), unknown = static_cast<T>(__builtin_nan(""));
  const int64_t most = kExponentials / t.nodes_count < kBlock ? kExponentials / t.nodes_count : kBlock;
  const int64_t block = t.k < most ? t.k : most;
  const bool curved = t.utility != SHAPLEYCAM_LOGIT, probability = t.utility == SHAPLEYCAM_PROBABILITY;
  const bool started = t.bias.data != nullptr;
  T weight[SHAPLEYCAM_MOST_NODES], whole = 0;
  for (int32_t q = 0; q < t.nodes_count; ++q) {
    to_z[q] = static_cast<T>(t.nodes[q]);
    to_start[q] = static_cast<T>(1.0 - t.nodes[q]);
    top[q] = nothing;
    total[q] = 0;
    weight[q] = static_cast<T>(t.weights[q] * t.scale);
    whole += weight[q];
  }
  // body(first, count, kept + node * block) with the path at a node, for every node of a block.
  const auto path = [&](int64_t i, int64_t count, auto body) {
    const T* z = load(t.logits, i, count, 1, z_scratch);
    const T* s = started ? load(t.bias, i, count, 1, s_scratch) : z;
    for (int32_t q = 0; q < t.nodes_count; ++q) {
      T* x = kept + q * block;
      const T a = to_z[q], b = to_start[q];
      if (started) {
        for (int64_t j = 0; j < count; ++j) x[j] = a * z[j] + b * s[j];
      } else {
        for (int64_t j = 0; j < count; ++j) x[j] = a * z[j];
      }
      body(q, x);
    }
  };
  const auto raise = [&](T* x, int64_t count, T from) {
    for (int64_t j = 0; j < count; ++j) x[j] = exponential(x[j] - from);
  };
  if (curved) {
    for (int64_t i = 0; i < t.k; i += block) {
      const int64_t count = t.k - i < block ? t.k - i : block;
      path(i, count, [&](int32_t q, T* x) {
        const T high = highest(x, count, top[q]);
        // Where everything so far is -Inf or NaN, the exponentials are of no use as they are: 0, or NaN.
        raise(x, count, high == nothing ? T(0) : high);
        T sum = 0;
        for (int64_t j = 0; j < count; ++j) sum += x[j];
        total[q] = total[q] * (high == top[q] ? T(1) : exponential(top[q] - high)) + sum;
        top[q] = high;
      });
    }
  }
  T* rows = static_cast<T*>(t.rows);
  for (int64_t i = 0; i < t.k; i += block) {
    const int64_t count = t.k - i < block ? t.k - i : block;
    if (curved && block < t.k) path(i, count, [&](int32_t q, T* x) { raise(x, count, top[q]); });
    const auto combine = [&](T* to, const T* factors) {
      for (int64_t j = 0; j < count; ++j) to[j] = 0;
      for (int32_t q = 0; curved && q < t.nodes_count; ++q) {
        const T* e = kept + q * block;
        const T factor = factors[q];
        for (int64_t j = 0; j < count; ++j) to[j] += factor * e[j];
      }
    };
    // The sum over the nodes is the same for every class, but where the coefficients depend on its probability.
    const Coefficients<T> fixed = coefficients<T>(t.utility, 1, T(1), T(0), T(0));
    T factors[SHAPLEYCAM_MOST_NODES];
    for (int32_t q = 0; q < t.nodes_count; ++q) factors[q] = fixed.on_p * weight[q] / total[q];
    T* shared = z_scratch;
    if (!probability) combine(shared, factors);
    for (int64_t m = 0; m < t.m; ++m) {
      T* row = rows + m * t.k + i;
      const int64_t c = t.targets[m];
      if (c < 0 || c >= t.k) {
        for (int64_t j = 0; j < count; ++j) row[j] = unknown;
        continue;
      }
      T on_class = fixed.on_class * whole;
      if (probability) {
        T z_c, s_c, own[SHAPLEYCAM_MOST_NODES];
        const T z = *load(t.logits, c, 1, 1, &z_c), s = started ? *load(t.bias, c, 1, 1, &s_c) : T(0);
        on_class = 0;
        for (int32_t q = 0; q < t.nodes_count; ++q) {
          const T x = started ? to_z[q] * z + to_start[q] * s : to_z[q] * z;
          const Coefficients<T> on = coefficients<T>(t.utility, 1, exponential(x - top[q]) / total[q], T(0), T(0));
          on_class += weight[q] * on.on_class;
          own[q] = weight[q] * on.on_p / total[q];
        }
        combine(row, own);
      } else {
        for (int64_t j = 0; j < count; ++j) row[j] = shared[j];
      }
      if (c >= i && c < i + count) row[c - i] += on_class;
    }
  }
}

}  // namespace SHAPLEYCAM_ARCH
}  // namespace shapleycam
