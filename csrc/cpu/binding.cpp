// The CPU's implementations of the operators in ../ops.cpp: checks, threads, and sums merged in a fixed order.
//
// Rows are cut into chunks of CHUNK, whatever the number of threads; every chunk leaves a partial sum, and partial sums
// are merged in the order of their chunks. Threads are torch's own (torch.set_num_threads).
#define TORCH_TARGET_VERSION 0x020a000000000000  // as in ops.cpp
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../checks.h"
#include "rows.h"

namespace thresholdnet {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using Tensors = std::vector<Tensor>;

constexpr int64_t CHUNK = 128;    // rows a partial sum
constexpr int64_t GRAIN = 32768;  // elements that are worth a thread
constexpr int64_t BAND = 8;       // rows of an image that a thread pools at once

const Table& table() {
  static const Table& chosen = []() -> const Table& {
#if defined(__x86_64__)
    const char* wish = std::getenv("THRESHOLDNET_CPU");  // baseline, avx2: less than the machine has
    const std::string limit = wish ? wish : "";
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (v4 && limit != "baseline" && limit != "avx2") return avx512_table;
    if (v3 && limit != "baseline") return avx2_table;
#endif
    return baseline_table;
  }();
  return chosen;
}

template <class E>
const Kernels<E>& kernels();
template <>
const Kernels<float>& kernels() { return table().f32; }
template <>
const Kernels<double>& kernels() { return table().f64; }
template <>
const Kernels<bfloat16>& kernels() { return table().bf16; }

// Calls f with a value of the element type.
template <class F>
void by_type(const char* op, const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    case ScalarType::BFloat16: return f(bfloat16());
    default: refuse(op, ": tensors must be float32, float64 or bfloat16");
  }
}

ScalarType wide_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class A>
Range<A> range_of(const char* op, int64_t activation) {
  constexpr A infinity = std::numeric_limits<A>::infinity();
  switch (activation) {
    case 0: return {-infinity, infinity};
    case 1: return {0, infinity};
    case 2: return {0, 6};
    default: refuse(op, ": activation must be 0 (none), 1 (ReLU) or 2 (ReLU6), got ", activation);
  }
}

int64_t chunks_of(int64_t rows) { return (rows + CHUNK - 1) / CHUNK; }

template <class F>
void for_chunks(int64_t rows, int64_t channels, const F& f) {
  const int64_t grain = std::max<int64_t>(1, GRAIN / (CHUNK * std::max<int64_t>(1, channels)));
  torch::stable::parallel_for(0, chunks_of(rows), grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) f(k, k * CHUNK, std::min(rows, (k + 1) * CHUNK));
  });
}

template <class E>
Rows<const E> reading(const char* op, const std::string& name, const Tensor& t, const Tensor& like, Pixels p) {
  const int64_t stride = row_stride(op, name, t, like, p);
  return {static_cast<const E*>(t.data_ptr()), stride};
}

template <class E>
Rows<E> writing(const char* op, const std::string& name, const Tensor& t, const Tensor& like, Pixels p) {
  const int64_t stride = row_stride(op, name, t, like, p);
  return {static_cast<E*>(t.data_ptr()), stride};
}

template <class A>
const A* vector(const char* op, const std::string& name, const Tensor& t, int64_t length, const Tensor& like) {
  vector_of(op, name, t, length, wide_type(like));
  return static_cast<const A*>(t.data_ptr());
}

void channels_must(const char* op, const char* name, const Tensor& t, int64_t channels) {
  if (t.size(1) != channels) refuse(op, ": ", name, " must have ", channels, " channels, got ", t.size(1));
}

std::string numbered(const char* name, size_t j) { return std::string(name) + " " + std::to_string(j); }

int64_t channels_of(const char* op, const Tensors& list, const Tensor& like, Pixels p) {
  int64_t total = 0;
  for (size_t j = 0; j < list.size(); ++j) {
    row_stride(op, numbered("tensor", j), list[j], like, p);
    total += list[j].size(1);
  }
  return total;
}

Tensor two_vectors(const Tensor& like, int64_t channels) {
  const std::vector<int64_t> shape{2, channels};
  return torch::stable::empty(shape, wide_type(like), std::nullopt, like.device(), std::nullopt, MemoryFormat::Contiguous);
}

// Partial sums [chunks, 2, channels] -> [2, channels].
template <class A>
void add_up(const A* partial, int64_t chunks, int64_t channels, A* sums) {
  for (int64_t c = 0; c < 2 * channels; ++c) {
    double sum = 0;
    for (int64_t k = 0; k < chunks; ++k) sum += partial[k * 2 * channels + c];
    sums[c] = static_cast<A>(sum);
  }
}

void gather(
    Tensors sources, std::optional<Tensor> scale, std::optional<Tensor> shift, int64_t activation, Tensor out) {
  const char* op = "gather";
  const Pixels p = pixels_of(op, "out", out);
  channels_must(op, "out", out, channels_of(op, sources, out, p));
  if (scale.has_value() != shift.has_value()) refuse(op, ": scale and shift must come together");
  by_type(op, out, [&](auto element) {
    using E = decltype(element);
    using A = typename Wide<E>::type;
    const auto act = range_of<A>(op, activation);
    const auto to = writing<E>(op, "out", out, out, p);
    const A* factor = scale ? vector<A>(op, "scale", *scale, out.size(1), out) : nullptr;
    const A* constant = shift ? vector<A>(op, "shift", *shift, out.size(1), out) : nullptr;
    std::vector<Part<E>> parts(sources.size());
    int64_t start = 0;
    for (size_t j = 0; j < parts.size(); ++j) {
      Part<E>& part = parts[j];
      part.channels = sources[j].size(1);
      part.in = reading<E>(op, numbered("source", j), sources[j], out, p);
      part.scale = factor ? factor + start : nullptr;
      part.shift = constant ? constant + start : nullptr;
      start += part.channels;
    }
    for_chunks(p.rows(), out.size(1), [&](int64_t, int64_t first, int64_t last) {
      kernels<E>().gather(parts.data(), parts.size(), act, to, first, last);
    });
  });
}

Tensor moments(Tensor z) {
  const char* op = "moments";
  const Pixels p = pixels_of(op, "z", z);
  if (p.rows() == 0) refuse(op, ": z must have at least one pixel, got shape ", listed(z.sizes()));
  const int64_t channels = z.size(1), chunks = chunks_of(p.rows());
  const Tensor found = two_vectors(z, channels);
  by_type(op, z, [&](auto element) {
    using E = decltype(element);
    using A = typename Wide<E>::type;
    const auto from = reading<E>(op, "z", z, z, p);
    const std::unique_ptr<A[]> partial(new A[chunks * 2 * channels]);
    for_chunks(p.rows(), channels, [&](int64_t k, int64_t first, int64_t last) {
      kernels<E>().moments(from, channels, partial.get() + k * 2 * channels, first, last);
    });
    A* out = static_cast<A*>(found.data_ptr());
    for (int64_t c = 0; c < channels; ++c) {  // Chan, Golub, LeVeque: pairwise merge of means and squares
      double mean = 0, square = 0, count = 0;
      for (int64_t k = 0; k < chunks; ++k) {
        const double n = std::min(CHUNK, p.rows() - k * CHUNK), all = count + n;
        const double d = partial[k * 2 * channels + c] - mean;
        square += partial[(k * 2 + 1) * channels + c] + d * d * count * n / all;
        mean += d * n / all;
        count = all;
      }
      out[c] = static_cast<A>(mean);
      out[channels + c] = static_cast<A>(square / count);
    }
  });
  return found;
}

Tensor mask_sums(
    Tensor g, std::optional<Tensor> add, Tensor z, Tensor scale, Tensor shift, Tensor mean, Tensor rstd,
    int64_t activation, Tensor out) {
  const char* op = "mask_sums";
  const Pixels p = pixels_of(op, "z", z);
  const int64_t channels = z.size(1), chunks = chunks_of(p.rows());
  const Tensor sums = two_vectors(z, channels);
  by_type(op, z, [&](auto element) {
    using E = decltype(element);
    using A = typename Wide<E>::type;
    const auto act = range_of<A>(op, activation);
    const auto raw = reading<E>(op, "z", z, z, p), from = reading<E>(op, "g", g, z, p);
    const auto also = add ? reading<E>(op, "add", *add, z, p) : Rows<const E>();
    const auto to = writing<E>(op, "out", out, z, p);
    channels_must(op, "g", g, channels);
    channels_must(op, "out", out, channels);
    if (add) channels_must(op, "add", *add, channels);
    const Norm<A> norm{
        vector<A>(op, "scale", scale, channels, z), vector<A>(op, "shift", shift, channels, z),
        vector<A>(op, "mean", mean, channels, z), vector<A>(op, "rstd", rstd, channels, z)};
    const std::unique_ptr<A[]> partial(new A[chunks * 2 * channels]);
    for_chunks(p.rows(), channels, [&](int64_t k, int64_t first, int64_t last) {
      kernels<E>().mask_sums(
          from, also, raw, channels, norm, act, to, partial.get() + k * 2 * channels, first, last);
    });
    add_up(partial.get(), chunks, channels, static_cast<A*>(sums.data_ptr()));
  });
  return sums;
}

// The parts of a concatenation with what arrived before and where the result goes.
template <class E>
std::vector<Part<E>> parts_of(const char* op, const Tensors& before, const Tensors& out, const Tensor& like, Pixels p) {
  same_count(op, "before", before.size(), out.size());
  std::vector<Part<E>> parts(out.size());
  for (size_t j = 0; j < parts.size(); ++j) {
    parts[j].channels = out[j].size(1);
    parts[j].out = writing<E>(op, numbered("out", j), out[j], like, p);
    if (before[j].numel()) {
      parts[j].before = reading<E>(op, numbered("before", j), before[j], like, p);
      channels_must(op, "before", before[j], parts[j].channels);
    }
  }
  return parts;
}

Tensor send(
    Tensor g, Tensors sources, Tensor scale, Tensor shift, Tensor mean, Tensor rstd, Tensors before,
    int64_t activation, Tensors out) {
  const char* op = "send";
  const Pixels p = pixels_of(op, "g", g);
  const int64_t total = channels_of(op, sources, g, p), chunks = chunks_of(p.rows());
  same_count(op, "out", out.size(), sources.size());
  channels_must(op, "g", g, total);
  const Tensor sums = two_vectors(g, total);
  by_type(op, g, [&](auto element) {
    using E = decltype(element);
    using A = typename Wide<E>::type;
    const auto act = range_of<A>(op, activation);
    const auto from = reading<E>(op, "g", g, g, p);
    auto parts = parts_of<E>(op, before, out, g, p);
    for (size_t j = 0; j < parts.size(); ++j) {
      parts[j].in = reading<E>(op, numbered("source", j), sources[j], g, p);
      channels_must(op, "out", out[j], sources[j].size(1));
    }
    const Norm<A> norm{
        vector<A>(op, "scale", scale, total, g), vector<A>(op, "shift", shift, total, g),
        vector<A>(op, "mean", mean, total, g), vector<A>(op, "rstd", rstd, total, g)};
    const std::unique_ptr<A[]> partial(new A[chunks * 2 * total]);
    for_chunks(p.rows(), total, [&](int64_t k, int64_t first, int64_t last) {
      kernels<E>().send(
          from, parts.data(), parts.size(), norm, act, partial.get() + k * 2 * total, total, first, last);
    });
    add_up(partial.get(), chunks, total, static_cast<A*>(sums.data_ptr()));
  });
  return sums;
}

void linear(Tensor g, Tensor z, std::optional<Tensor> a, Tensor b, Tensor c, Tensor out) {
  const char* op = "linear";
  const Pixels p = pixels_of(op, "g", g);
  const int64_t channels = g.size(1);
  by_type(op, g, [&](auto element) {
    using E = decltype(element);
    using A = typename Wide<E>::type;
    const auto from = reading<E>(op, "g", g, g, p), raw = reading<E>(op, "z", z, g, p);
    const auto to = writing<E>(op, "out", out, g, p);
    channels_must(op, "z", z, channels);
    channels_must(op, "out", out, channels);
    const A* first_factor = a ? vector<A>(op, "a", *a, channels, g) : nullptr;
    const A *second = vector<A>(op, "b", b, channels, g), *constant = vector<A>(op, "c", c, channels, g);
    for_chunks(p.rows(), channels, [&](int64_t, int64_t first, int64_t last) {
      kernels<E>().linear(from, raw, channels, first_factor, second, constant, to, first, last);
    });
  });
}

Pool pool_of(const char* op, const Tensor& x, int64_t kernel, int64_t stride, int64_t padding) {
  const Pixels p = pixels_of(op, "x", x);
  if (kernel < 1 || stride < 1 || padding < 0 || 2 * padding > kernel) {
    refuse(
        op, ": kernel_size and stride must be positive and padding at most half of kernel_size, got ", kernel, ", ",
        stride, " and ", padding);
  }
  if (p.h + 2 * padding < kernel || p.w + 2 * padding < kernel) {
    refuse(op, ": x must be at least as large as the window, ", kernel, " with padding ", padding, ", got shape ",
           listed(x.sizes()));
  }
  if (row_stride(op, "x", x, x, p) != x.size(1)) refuse(op, ": x must be channels_last, got a slice of channels");
  const int64_t out_height = (p.h + 2 * padding - kernel) / stride + 1;
  return {p.h, p.w, x.size(1), out_height, (p.w + 2 * padding - kernel) / stride + 1, kernel, stride, padding};
}

// Calls f(image, first, last) for every band of an image's rows.
template <class F>
void for_bands(int64_t images, int64_t rows, const F& f) {
  const int64_t bands = (rows + BAND - 1) / BAND;
  torch::stable::parallel_for(0, images * bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = k % bands * BAND;
      f(k / bands, first, std::min(rows, first + BAND));
    }
  });
}

Tensor pixels_like(const Tensor& like, int64_t height, int64_t width) {
  const std::vector<int64_t> shape{like.size(0), like.size(1), height, width};
  return torch::stable::empty(
      shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt, MemoryFormat::ChannelsLast);
}

Tensor max_pool2d(Tensor x, int64_t kernel, int64_t stride, int64_t padding) {
  const Pool pool = pool_of("max_pool2d", x, kernel, stride, padding);
  const Tensor out = pixels_like(x, pool.out_height, pool.out_width);
  by_type("max_pool2d", x, [&](auto element) {
    using E = decltype(element);
    const E* from = static_cast<const E*>(x.data_ptr());
    E* to = static_cast<E*>(out.data_ptr());
    const int64_t read = pool.height * pool.width * pool.channels;
    const int64_t written = pool.out_height * pool.out_width * pool.channels;
    for_bands(x.size(0), pool.out_height, [&](int64_t image, int64_t first, int64_t last) {
      kernels<E>().max_pool(from + image * read, to + image * written, pool, first, last);
    });
  });
  return out;
}

Tensor max_pool2d_backward(Tensor grad, Tensor x, int64_t kernel, int64_t stride, int64_t padding) {
  const char* op = "max_pool2d_backward";
  const Pool pool = pool_of(op, x, kernel, stride, padding);
  const Pixels out{x.size(0), pool.out_height, pool.out_width};
  if (row_stride(op, "grad", grad, x, out) != pool.channels || grad.size(1) != pool.channels)
    refuse(op, ": grad must be channels_last with ", pool.channels, " channels, got shape ", listed(grad.sizes()));
  const Tensor made = pixels_like(x, pool.height, pool.width);
  by_type(op, x, [&](auto element) {
    using E = decltype(element);
    const E *arriving = static_cast<const E*>(grad.data_ptr()), *from = static_cast<const E*>(x.data_ptr());
    E* to = static_cast<E*>(made.data_ptr());
    const int64_t size = pool.height * pool.width * pool.channels;
    const int64_t pooled = pool.out_height * pool.out_width * pool.channels;
    for_bands(x.size(0), pool.height, [&](int64_t image, int64_t first, int64_t last) {
      kernels<E>().max_pool_backward(
          arriving + image * pooled, from + image * size, to + image * size, pool, first, last);
    });
  });
  return made;
}

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

std::string build_info() {
  return std::string("compiler ") +
#if defined(__clang__)
      "clang " __clang_version__
#else
      "g++ " __VERSION__
#endif
      + "\nflags " TEXT(THRESHOLDNET_FLAGS) + "\nheaders torch " TORCH_VERSION + "\nabi torch 2.10" +
      "\ninstructions " + table().name;
}

}  // namespace
}  // namespace thresholdnet

STABLE_TORCH_LIBRARY_IMPL(thresholdnet_csrc, CPU, m) {
  m.impl("gather", TORCH_BOX(&thresholdnet::gather));
  m.impl("moments", TORCH_BOX(&thresholdnet::moments));
  m.impl("mask_sums", TORCH_BOX(&thresholdnet::mask_sums));
  m.impl("send", TORCH_BOX(&thresholdnet::send));
  m.impl("linear", TORCH_BOX(&thresholdnet::linear));
  m.impl("max_pool2d", TORCH_BOX(&thresholdnet::max_pool2d));
  m.impl("max_pool2d_backward", TORCH_BOX(&thresholdnet::max_pool2d_backward));
}

STABLE_TORCH_LIBRARY_IMPL(thresholdnet_csrc, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&thresholdnet::build_info));
}
