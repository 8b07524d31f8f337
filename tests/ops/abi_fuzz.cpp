// Throws arguments at the C ABI, good and bad, with heap buffers of exactly the size that the arguments claim. Under
// AddressSanitizer any read or write beyond them ends the program; here, a bad argument must give a status and an untouched
// output, and a good one SHAPLEYCAM_OK. Usage: abi_fuzz [rounds] [seed]
#include <shapleycam.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

namespace {

std::mt19937_64 source;

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(source); }
bool chance(int percent) { return draw(0, 99) < percent; }

size_t bytes_of(int32_t dtype) {
  const size_t sizes[] = {4, 8, 2, 2, 1};
  return sizes[dtype];
}

// A buffer of exactly `bytes`, so that one byte more is seen.
struct Buffer {
  size_t bytes;
  std::unique_ptr<uint8_t[]> data;
  explicit Buffer(size_t size, int fill = -1) : bytes(size), data(new uint8_t[size]) {
    for (size_t i = 0; i < size; ++i) data[i] = fill < 0 ? static_cast<uint8_t>(source()) : static_cast<uint8_t>(fill);
  }
  bool untouched() const {
    for (size_t i = 0; i < bytes; ++i) {
      if (data[i] != 0xA5) return false;
    }
    return true;
  }
};

// A random layout of [n, c, s] with the buffer it needs: both orders, expanded dimensions, gaps.
struct Tensor {
  shapleycam_view view;
  std::unique_ptr<Buffer> buffer;
  Tensor(int64_t n, int64_t c, int64_t s, int32_t dtype) {
    const int64_t gap = chance(30) ? 2 : 1;
    int64_t sc, ss, sn;
    if (chance(50)) {
      ss = gap, sc = s * ss + draw(0, 2), sn = c * sc;
    } else {
      sc = gap, ss = c * sc + draw(0, 2), sn = s * ss;
    }
    if (chance(15)) ss = 0;
    if (chance(15)) sn = 0;
    const int64_t last = (n > 0 ? (n - 1) * sn : 0) + (c - 1) * sc + (s - 1) * ss;
    buffer = std::make_unique<Buffer>(static_cast<size_t>(last + 1) * bytes_of(dtype));
    view = {buffer->data.get(), dtype, sn, sc, ss};
  }
};

int failures = 0;

// Where the CUDA half was compiled for the CPU, some calls go there: an emulated block of threads is slow.
#if defined(SHAPLEYCAM_CUDA_ON_CPU)
bool on_cuda() { return chance(6); }
#else
bool on_cuda() { return false; }
#endif

void expect(const char* what, bool good, int32_t status, const Buffer& out) {
  const bool right = good ? status == SHAPLEYCAM_OK : status != SHAPLEYCAM_OK && out.untouched();
  if (right) return;
  ++failures;
  std::fprintf(stderr, "%s: %s arguments gave '%s'\n", what, good ? "good" : "bad", shapleycam_status_text(status));
}

const int64_t kAbsurd[] = {-1, INT64_MIN, INT64_MAX, INT64_MAX / 2};

void reduce() {
  int64_t n = draw(0, 4), c = draw(1, 90), s = draw(1, 60), m = draw(0, 3);
  const bool sum = chance(40);
  const int32_t dtype = static_cast<int32_t>(draw(0, 3));
  int32_t pooling = static_cast<int32_t>(draw(0, 5)), out_dtype = dtype == SHAPLEYCAM_FLOAT64 ? 1 : 0;
  Tensor a(n, c, s, dtype), g(n, c, s, static_cast<int32_t>(draw(0, 3))), h(n, c, s, static_cast<int32_t>(draw(0, 3)));
  const size_t element = bytes_of(out_dtype);
  Buffer out(static_cast<size_t>(n * s * (sum ? m : 1)) * element, 0xA5), alpha(static_cast<size_t>(n * m * c) * element);
  const bool cuda = on_cuda();
  size_t room = 0;
  if (sum) {
    room = (cuda ? shapleycam_channel_weighted_sum_workspace_cuda : shapleycam_channel_weighted_sum_workspace_cpu)(n, c, s, m);
  } else {
    room = (cuda ? shapleycam_weighted_reduce_workspace_cuda : shapleycam_weighted_reduce_workspace_cpu)(n, c, s, pooling);
  }
  Buffer workspace(room);
  void *to = out.data.get(), *space = workspace.data.get();
  const void* weights = alpha.data.get();
  const shapleycam_view *va = &a.view, *vg = &g.view, *vh = chance(50) ? &h.view : nullptr;
  bool good = true;
  const bool empty = n == 0 || (sum && m == 0);  // then nothing but the extents is looked at
  switch (chance(60) ? draw(0, 9) : -1) {
    case 0: {
      const int64_t extent = chance(50) ? 0 : kAbsurd[draw(0, 3)];
      (chance(50) ? c : s) = extent;
      good = n == 0 && extent > 0;  // no images: no elements, whatever the extents
      break;
    }
    case 1:
      n = kAbsurd[draw(0, 3)];
      good = false;
      break;
    case 2:
      to = nullptr;
      good = empty;
      break;
    case 3:
      va = nullptr;
      good = empty;
      break;
    case 4:
      a.view.dtype = chance(50) ? 4 : chance(50) ? -1 : 77;
      good = empty;
      break;
    case 5:
      out_dtype = out_dtype == 0 ? static_cast<int32_t>(draw(1, 4)) : 0;
      good = empty;
      break;
    case 6:
      if (room > 0) {
        --room;
        good = empty;
      }
      break;
    case 7:
      if (room > 0) {
        space = nullptr;
        good = empty;
      }
      break;
    case 8:
      a.view.data = static_cast<const uint8_t*>(a.view.data) + 1;
      good = empty;
      break;
    case 9:
      if (sum) {
        weights = nullptr;
        good = empty;
      } else {
        pooling = chance(50) ? -1 : 6;
        good = false;
      }
      break;
    default:
      break;
  }
  const int32_t threads = static_cast<int32_t>(chance(10) ? draw(-3, 100) : draw(1, 3));
  if (sum) {
    expect("channel_weighted_sum", good,
           cuda ? shapleycam_channel_weighted_sum_cuda(va, weights, n, c, s, m, to, out_dtype, space, room, nullptr)
                : shapleycam_channel_weighted_sum_cpu(va, weights, n, c, s, m, to, out_dtype, space, room, threads),
           out);
  } else {
    expect("weighted_reduce", good,
           cuda ? shapleycam_weighted_reduce_cuda(va, vg, vh, n, c, s, pooling, to, out_dtype, space, room, nullptr)
                : shapleycam_weighted_reduce_cpu(va, vg, vh, n, c, s, pooling, to, out_dtype, space, room, threads),
           out);
  }
}

void display() {
  int64_t n = draw(0, 3), from[3], to[3], read = n, written = n;
  for (int i = 0; i < 3; ++i) {
    from[i] = i == 0 && chance(60) ? 1 : draw(1, 9);
    to[i] = chance(20) ? from[i] : draw(1, 20);
    read *= from[i];
    written *= to[i];
  }
  int32_t dtype = static_cast<int32_t>(draw(0, 1)), out_dtype = chance(50) ? dtype : chance(50) ? 2 : 4;
  Buffer raw(static_cast<size_t>(read) * bytes_of(dtype)), out(static_cast<size_t>(written) * bytes_of(out_dtype), 0xA5);
  const void* source_data = raw.data.get();
  void* target = out.data.get();
  bool good = true;
  switch (chance(50) ? draw(0, 5) : -1) {
    case 0:
      (chance(50) ? from : to)[draw(0, 2)] = chance(50) ? 0 : kAbsurd[draw(0, 1)];
      good = false;
      break;
    case 1:
      n = kAbsurd[draw(0, 3)];
      good = false;
      break;
    case 2:
      dtype = chance(50) ? static_cast<int32_t>(draw(2, 4)) : -5;
      good = false;
      break;
    case 3:
      out_dtype = chance(50) ? 3 : 99;
      good = false;
      break;
    case 4:
      source_data = nullptr;
      good = n == 0;
      break;
    case 5:
      target = nullptr;
      good = n == 0;
      break;
    default:
      break;
  }
  const bool again = chance(50);
  const int32_t threads = static_cast<int32_t>(draw(0, 3));
  expect("display_map", good,
         on_cuda() ? shapleycam_display_map_cuda(source_data, dtype, n, from, to, again, target, out_dtype, nullptr)
                   : shapleycam_display_map_cpu(source_data, dtype, n, from, to, again, target, out_dtype, threads),
         out);
}

void overlay() {
  int64_t n = draw(1, 3), h = draw(1, 9), w = draw(1, 20);
  int32_t dtype = static_cast<int32_t>(draw(0, 4));
  const int64_t first[4] = {3 * h * w, h * w, w, 1}, last[4] = {3 * h * w, 1, 3 * w, 3};
  const int64_t* strides = chance(50) ? first : last;
  const size_t pixels = static_cast<size_t>(n * h * w);
  Buffer images(pixels * 3 * bytes_of(dtype)), heat(pixels * 4), table(768), out(pixels * 3, 0xA5);
  const float mean[3] = {0.4f, 0.5f, 0.6f}, std[3] = {0.2f, 0.3f, 0.25f};
  const float *m = chance(50) ? mean : nullptr, *d = m != nullptr ? std : nullptr;
  const float* heat_data = reinterpret_cast<const float*>(heat.data.get());
  const uint8_t* colours = table.data.get();
  uint8_t* target = out.data.get();
  bool good = true;
  switch (chance(50) ? draw(0, 6) : -1) {
    case 0:
      n = kAbsurd[draw(0, 3)];
      good = false;
      break;
    case 1:
      (chance(50) ? h : w) = kAbsurd[draw(0, 3)];
      good = false;
      break;
    case 2:
      dtype = chance(50) ? -1 : 5;
      good = false;
      break;
    case 3:
      heat_data = nullptr;
      good = false;
      break;
    case 4:
      colours = nullptr;
      good = false;
      break;
    case 5:
      target = nullptr;
      good = false;
      break;
    case 6:
      d = d == nullptr ? std : nullptr;
      good = false;
      break;
    default:
      break;
  }
  const void* pixels_data = images.data.get();
  const int32_t threads = static_cast<int32_t>(draw(0, 3));
  expect("overlay", good,
         on_cuda()
             ? shapleycam_overlay_cuda(pixels_data, dtype, n, h, w, strides, heat_data, colours, 0.5f, m, d, target, nullptr)
             : shapleycam_overlay_cpu(pixels_data, dtype, n, h, w, strides, heat_data, colours, 0.5f, m, d, target, threads),
         out);
}

void rows() {
  int64_t n = draw(0, 4), m = draw(0, 3), k = draw(1, 70), stride = k + (chance(30) ? draw(1, 5) : 0);
  if (chance(10)) stride = 0;
  int32_t dtype = static_cast<int32_t>(draw(0, 3)), bias_dtype = static_cast<int32_t>(draw(0, 3));
  int32_t out_dtype = dtype == SHAPLEYCAM_FLOAT64 ? 1 : 0, utility = static_cast<int32_t>(draw(0, 3));
  int32_t order = static_cast<int32_t>(draw(1, 2));
  Buffer logits(static_cast<size_t>(n > 0 ? (n - 1) * stride + k : 0) * bytes_of(dtype));
  Buffer bias(static_cast<size_t>(k) * bytes_of(bias_dtype)), out(static_cast<size_t>(n * m * k) * bytes_of(out_dtype), 0xA5);
  std::vector<int64_t> targets(static_cast<size_t>(n * m));
  for (int64_t& target : targets) target = chance(20) ? kAbsurd[draw(0, 3)] : draw(0, k - 1);
  const void *z = logits.data.get(), *b = chance(50) ? bias.data.get() : nullptr;
  const int64_t* classes = targets.data();
  void* to = out.data.get();
  const bool empty = n == 0 || m == 0;
  bool good = true;
  switch (chance(50) ? draw(0, 7) : -1) {
    case 0:
      n = kAbsurd[draw(0, 3)];
      good = false;
      break;
    case 1:
      k = chance(50) ? 0 : kAbsurd[draw(0, 1)];
      good = false;
      break;
    case 2:
      utility = chance(50) ? -1 : 4;
      good = false;
      break;
    case 3:
      order = chance(50) ? 0 : 3;
      good = false;
      break;
    case 4:
      z = nullptr;
      good = empty;
      break;
    case 5:
      classes = nullptr;
      good = empty;
      break;
    case 6:
      stride = -1;
      good = false;
      break;
    case 7:
      to = nullptr;
      good = empty;
      break;
    default:
      break;
  }
  const int32_t threads = static_cast<int32_t>(draw(0, 3));
  expect("utility_rows", good,
         on_cuda() ? shapleycam_utility_rows_cuda(z, dtype, stride, b, bias_dtype, classes, n, m, k, utility, order, 0.5, to,
                                                  out_dtype, nullptr)
                   : shapleycam_utility_rows_cpu(z, dtype, stride, b, bias_dtype, classes, n, m, k, utility, order, 0.5, to,
                                                 out_dtype, threads),
         out);
}

void integrals() {
  int64_t n = draw(0, 4), m = draw(0, 6), k = draw(1, 600), stride = k + (chance(30) ? draw(1, 5) : 0), start_stride = k;
  if (chance(20)) stride = 0;
  if (chance(40)) start_stride = chance(50) ? 0 : k + draw(1, 5);
  int32_t dtype = static_cast<int32_t>(draw(0, 3)), start_dtype = static_cast<int32_t>(draw(0, 3));
  int32_t out_dtype = dtype == SHAPLEYCAM_FLOAT64 ? 1 : 0, utility = static_cast<int32_t>(draw(0, 3));
  int32_t nodes = static_cast<int32_t>(chance(20) ? SHAPLEYCAM_MOST_NODES : draw(1, SHAPLEYCAM_MOST_NODES));
  const auto rows_of = [&](int64_t step) { return static_cast<size_t>(n > 0 ? (n - 1) * step + k : 0); };
  Buffer logits(rows_of(stride) * bytes_of(dtype)), start(rows_of(start_stride) * bytes_of(start_dtype));
  Buffer out(static_cast<size_t>(n * m * k) * bytes_of(out_dtype), 0xA5);
  std::vector<double> places(static_cast<size_t>(nodes), 0.5), parts(static_cast<size_t>(nodes), 1.0 / nodes);
  std::vector<int64_t> targets(static_cast<size_t>(n * m));
  for (int64_t& target : targets) target = chance(20) ? kAbsurd[draw(0, 3)] : draw(0, k - 1);
  const void *z = logits.data.get(), *s = chance(70) ? start.data.get() : nullptr;
  const double *t = places.data(), *w = parts.data();
  void* to = out.data.get();
  const bool empty = n == 0 || m == 0;
  bool good = true;
  switch (chance(50) ? draw(0, 6) : -1) {
    case 0:
      (chance(50) ? n : k) = kAbsurd[draw(0, 1)];
      good = false;
      break;
    case 1:
      utility = chance(50) ? -1 : 4;
      good = false;
      break;
    case 2:
      nodes = chance(50) ? 0 : SHAPLEYCAM_MOST_NODES + 1;
      good = false;
      break;
    case 3:
      (chance(50) ? t : w) = nullptr;
      good = false;
      break;
    case 4:
      (chance(50) ? stride : start_stride) = -1;
      good = false;
      break;
    case 5:
      z = nullptr;
      good = empty;
      break;
    case 6:
      to = nullptr;
      good = empty;
      break;
    default:
      break;
  }
  const int32_t threads = static_cast<int32_t>(draw(0, 3));
  expect("quadrature_rows", good,
         on_cuda() ? shapleycam_quadrature_rows_cuda(z, dtype, stride, s, start_dtype, start_stride, targets.data(), n, m, k,
                                                     utility, t, w, nodes, 0.5, to, out_dtype, nullptr)
                   : shapleycam_quadrature_rows_cpu(z, dtype, stride, s, start_dtype, start_stride, targets.data(), n, m, k,
                                                    utility, t, w, nodes, 0.5, to, out_dtype, threads),
         out);
}

void maps() {
  int64_t n = draw(0, 3), c = draw(1, 40), m = draw(0, 3), from[3], to[3], s = 1, shown = 1;
  for (int i = 0; i < 3; ++i) {
    from[i] = i == 0 && chance(60) ? 1 : draw(1, 6);
    to[i] = draw(1, 12);
    s *= from[i];
    shown *= to[i];
  }
  int32_t dtype = static_cast<int32_t>(draw(0, 3)), raw_dtype = dtype == SHAPLEYCAM_FLOAT64 ? 1 : 0;
  int32_t maps_dtype = chance(50) ? raw_dtype : chance(50) ? 2 : 4;
  Tensor a(n, c, s, dtype);
  Buffer alpha(static_cast<size_t>(n * m * c) * bytes_of(raw_dtype));
  Buffer raw(static_cast<size_t>(n * m * s) * bytes_of(raw_dtype), 0xA5);
  Buffer out(static_cast<size_t>(n * m * shown) * bytes_of(maps_dtype), 0xA5);
  const bool cuda = on_cuda(), empty = n == 0 || m == 0;
  size_t room =
      (cuda ? shapleycam_channel_weighted_sum_workspace_cuda : shapleycam_channel_weighted_sum_workspace_cpu)(n, c, s, m);
  Buffer workspace(room);
  const shapleycam_view* va = &a.view;
  const void* weights = alpha.data.get();
  void *signed_maps = raw.data.get(), *display_maps = out.data.get();
  bool good = true;
  switch (chance(50) ? draw(0, 6) : -1) {
    case 0:
      (chance(50) ? from : to)[draw(0, 2)] = chance(50) ? 0 : kAbsurd[draw(0, 1)];
      good = false;
      break;
    case 1:
      n = kAbsurd[draw(0, 1)];
      good = false;
      break;
    case 2:
      va = nullptr;
      good = empty;
      break;
    case 3:
      weights = nullptr;
      good = empty;
      break;
    case 4:
      maps_dtype = chance(50) ? 3 : 99;
      good = false;
      break;
    case 5:
      (chance(50) ? signed_maps : display_maps) = nullptr;
      good = empty;
      break;
    case 6:
      if (room > 0) {
        --room;
        good = empty;
      }
      break;
    default:
      break;
  }
  const bool again = chance(50);
  const int32_t threads = static_cast<int32_t>(draw(0, 3));
  const int32_t status = cuda ? shapleycam_class_maps_cuda(va, weights, n, c, m, from, to, again, signed_maps, raw_dtype,
                                                           display_maps, maps_dtype, workspace.data.get(), room, nullptr)
                              : shapleycam_class_maps_cpu(va, weights, n, c, m, from, to, again, signed_maps, raw_dtype,
                                                          display_maps, maps_dtype, workspace.data.get(), room, threads);
  expect("class_maps", good, status, out);
  if (!good) expect("class_maps (signed)", good, status, raw);
}

// The same bits from one thread and from several. There is no OpenMP runtime in this program, so the library starts them; the
// input is large enough for that (csrc/cpu/parallel.h).
void threads() {
  const int64_t n = 2, c = 512, s = 8 << 10;
  const std::vector<float> values(static_cast<size_t>(n * c * s), 0.5f);
  const shapleycam_view view = {values.data(), SHAPLEYCAM_FLOAT32, c * s, s, 1};
  const size_t room = shapleycam_weighted_reduce_workspace_cpu(n, c, s, SHAPLEYCAM_MEAN);
  std::vector<double> workspace(room / sizeof(double) + 1);
  std::vector<float> maps[2];
  for (int several = 0; several < 2; ++several) {
    maps[several].resize(static_cast<size_t>(n * s));
    const int32_t status = shapleycam_weighted_reduce_cpu(&view, &view, nullptr, n, c, s, SHAPLEYCAM_MEAN, maps[several].data(),
                                                          SHAPLEYCAM_FLOAT32, workspace.data(), room, several ? 4 : 1);
    if (status != SHAPLEYCAM_OK || maps[several][7] != 0.25f * static_cast<float>(c)) ++failures;
  }
  if (maps[0] != maps[1]) ++failures;
}

}  // namespace

int main(int count, char** arguments) {
  const long rounds = count > 1 ? std::strtol(arguments[1], nullptr, 10) : 20000;
  source.seed(count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1);
  threads();
  for (long i = 0; i < rounds; ++i) {
    reduce();
    display();
    overlay();
    rows();
    integrals();
    maps();
  }
  std::printf("%ld rounds, %d failures, %s\n", rounds, failures, shapleycam_cpu_variant());
  return failures == 0 ? 0 : 1;
}
