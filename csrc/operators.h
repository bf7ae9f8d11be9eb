// The operators of ops.cpp up to the loops: checks, results, pointers and strides. The same for every device.
//
// A Device runs the loops. It is made once a call, from a tensor that lies on it, after all checks:
//
//   HALF                                  whether it has loops for float16
//   gather(parts, act, out, rows)         and so on: see the calls below; parts carry their own scale and shift
//
// E is the element type, A the type of sums and vectors: float, or double for double.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "checks.h"

namespace thresholdnet {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using Tensors = std::vector<Tensor>;

inline ScalarType wide_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Pointers and strides of checked tensors.

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
  same_device(op, name, t, like);
  return static_cast<const A*>(t.data_ptr());
}

// A layer's own vector, in the element type.
template <class E>
const E* parameter(const char* op, const std::string& name, const Tensor& t, int64_t length, const Tensor& like) {
  if (t.dim() != 1 || t.size(0) != length || !t.is_contiguous() || t.scalar_type() != like.scalar_type())
    refuse(op, ": ", name, " must be a contiguous vector of ", length, " elements of gamma's dtype, got shape ",
           listed(t.sizes()));
  same_device(op, name, t, like);
  return static_cast<const E*>(t.data_ptr());
}

template <class A>
Norm<A> norm_of(
    const char* op, const Tensor& scale, const Tensor& shift, const Tensor& mean, const Tensor& rstd, int64_t channels,
    const Tensor& like) {
  return {
      vector<A>(op, "scale", scale, channels, like), vector<A>(op, "shift", shift, channels, like),
      vector<A>(op, "mean", mean, channels, like), vector<A>(op, "rstd", rstd, channels, like)};
}

inline std::string numbered(const char* name, size_t j) { return std::string(name) + " " + std::to_string(j); }

inline int64_t channels_of(const char* op, const Tensors& list, const Tensor& like, Pixels p) {
  int64_t total = 0;
  for (size_t j = 0; j < list.size(); ++j) {
    row_stride(op, numbered("tensor", j), list[j], like, p);
    total += list[j].size(1);
  }
  return total;
}

// The parts of a concatenation with what arrived before and where the result goes.
template <class E>
std::vector<Part<E>> parts_of(const char* op, const Tensors& before, const Tensors& out, const Tensor& like, Pixels p) {
  same_count(op, "before", before.size(), out.size());
  std::vector<Part<E>> parts(out.size());
  for (size_t j = 0; j < parts.size(); ++j) {
    parts[j].out = writing<E>(op, numbered("out", j), out[j], like, p);
    parts[j].channels = out[j].size(1);
    if (before[j].numel()) {
      parts[j].before = reading<E>(op, numbered("before", j), before[j], like, p);
      channels_must(op, "before", before[j], parts[j].channels);
    }
  }
  return parts;
}

// The parts of a concatenation, each with its part of the affine over all channels.
template <class E>
std::vector<Part<E>> affine_parts(
    const char* op, const Tensors& sources, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
    const Tensor& like, Pixels p) {
  using A = typename Wide<E>::type;
  if (scale.has_value() != shift.has_value()) refuse(op, ": scale and shift must come together");
  const int64_t channels = channels_of(op, sources, like, p);
  const A* factor = scale ? vector<A>(op, "scale", *scale, channels, like) : nullptr;
  const A* constant = shift ? vector<A>(op, "shift", *shift, channels, like) : nullptr;
  std::vector<Part<E>> parts(sources.size());
  int64_t start = 0;
  for (size_t j = 0; j < parts.size(); ++j) {
    Part<E>& part = parts[j];
    part.channels = sources[j].size(1);
    part.in = reading<E>(op, numbered("source", j), sources[j], like, p);
    part.scale = factor ? factor + start : nullptr;
    part.shift = constant ? constant + start : nullptr;
    start += part.channels;
  }
  return parts;
}

constexpr int64_t LARGEST_STEP = int64_t{1} << 30;  // of windows: devices may count in 32 bits

inline Pool pool_of(const char* op, const Tensor& x, int64_t kernel, int64_t stride, int64_t padding) {
  const Pixels p = pixels_of(op, "x", x);
  const auto counts = [](int64_t step) { return step >= 1 && step <= LARGEST_STEP; };
  if (!counts(kernel) || !counts(stride) || padding < 0 || padding > kernel / 2) {
    refuse(
        op, ": kernel_size and stride must lie from 1 to 2^30 and padding from 0 to half of kernel_size, got ", kernel,
        ", ", stride, " and ", padding);
  }
  if (p.h < 1 || p.w < 1 || p.h + 2 * padding < kernel || p.w + 2 * padding < kernel) {
    refuse(op, ": x must have pixels, at least as many as the window, ", kernel, " with padding ", padding,
           ", got shape ", listed(x.sizes()));
  }
  if (row_stride(op, "x", x, x, p) != x.size(1)) refuse(op, ": x must be channels_last, got a slice of channels");
  const int64_t out_height = (p.h + 2 * padding - kernel) / stride + 1;
  return {p.h, p.w, x.size(1), out_height, (p.w + 2 * padding - kernel) / stride + 1, kernel, stride, padding};
}

// Refuses a gradient that is not one of the pooled x.
inline void pooled_must(const char* op, const Tensor& grad, const Tensor& x, const Pool& pool) {
  const Pixels out{x.size(0), pool.out_height, pool.out_width};
  if (row_stride(op, "grad", grad, x, out) != pool.channels || grad.size(1) != pool.channels)
    refuse(op, ": grad must be channels_last with ", pool.channels, " channels, got shape ", listed(grad.sizes()));
}

// New tensors.

inline Tensor two_vectors(const Tensor& like, int64_t channels) {
  const std::vector<int64_t> shape{2, channels};
  return torch::stable::empty(
      shape, wide_type(like), std::nullopt, like.device(), std::nullopt, MemoryFormat::Contiguous);
}

inline Tensor pixels_like(const Tensor& like, int64_t height, int64_t width) {
  const std::vector<int64_t> shape{like.size(0), like.size(1), height, width};
  return torch::stable::empty(
      shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt, MemoryFormat::ChannelsLast);
}

// Calls f with a value of the element type.
template <bool HALF, class F>
void by_type(const char* op, const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    case ScalarType::BFloat16: return f(bfloat16());
    case ScalarType::Half:
      if constexpr (HALF) return f(float16());
      [[fallthrough]];
    default: refuse(op, ": tensors must be float32, float64", HALF ? ", bfloat16 or float16" : " or bfloat16");
  }
}

// The same for operators of a CPU that has no loops for half formats.
template <class F>
void by_exact_type(const char* op, const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    default: refuse(op, ": tensors must be float32 or float64");
  }
}

template <class Device>
struct Operators {
  // Calls f with a value of the element type.
  template <class F>
  static void by_type(const char* op, const Tensor& t, const F& f) {
    thresholdnet::by_type<Device::HALF>(op, t, f);
  }

  static void gather(
      Tensors sources, std::optional<Tensor> scale, std::optional<Tensor> shift, double activation, Tensor out) {
    const char* op = "gather";
    const Pixels p = pixels_of(op, "out", out);
    channels_must(op, "out", out, channels_of(op, sources, out, p));
    by_type(op, out, [&](auto element) {
      using E = decltype(element);
      using A = typename Wide<E>::type;
      const auto act = range_of<A>(op, activation);
      const auto to = writing<E>(op, "out", out, out, p);
      const auto parts = affine_parts<E>(op, sources, scale, shift, out, p);
      Device(op, out).gather(parts, out.size(1), act, to, p.rows());
    });
  }

  static Tensor moments(Tensor z) {
    const char* op = "moments";
    const Pixels p = pixels_of(op, "z", z);
    if (p.rows() == 0) refuse(op, ": z must have at least one pixel, got shape ", listed(z.sizes()));
    const int64_t channels = z.size(1);
    const Tensor found = two_vectors(z, channels);
    by_type(op, z, [&](auto element) {
      using E = decltype(element);
      using A = typename Wide<E>::type;
      const auto from = reading<E>(op, "z", z, z, p);
      Device(op, z).moments(from, channels, p.rows(), static_cast<A*>(found.data_ptr()));
    });
    return found;
  }

  static Tensor mask_sums(
      Tensor g, std::optional<Tensor> add, Tensor z, Tensor scale, Tensor shift, Tensor mean, Tensor rstd,
      double activation, Tensor out) {
    const char* op = "mask_sums";
    const Pixels p = pixels_of(op, "z", z);
    const int64_t channels = z.size(1);
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
      const auto norm = norm_of<A>(op, scale, shift, mean, rstd, channels, z);
      Device(op, z).mask_sums(from, also, raw, channels, norm, act, to, p.rows(), static_cast<A*>(sums.data_ptr()));
    });
    return sums;
  }

  static Tensor send(
      Tensor g, Tensors sources, Tensor scale, Tensor shift, Tensor mean, Tensor rstd, Tensors before,
      double activation, Tensors out) {
    const char* op = "send";
    const Pixels p = pixels_of(op, "g", g);
    const int64_t total = channels_of(op, sources, g, p);
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
      const auto norm = norm_of<A>(op, scale, shift, mean, rstd, total, g);
      Device(op, g).send(from, parts, norm, act, total, p.rows(), static_cast<A*>(sums.data_ptr()));
    });
    return sums;
  }

  static void linear(
      Tensor g, Tensor z, std::optional<Tensor> a, Tensor b, Tensor c, std::optional<Tensor> mean, Tensor out) {
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
      const A* first = a ? vector<A>(op, "a", *a, channels, g) : nullptr;
      const A *second = vector<A>(op, "b", b, channels, g), *constant = vector<A>(op, "c", c, channels, g);
      const A* center = mean ? vector<A>(op, "mean", *mean, channels, g) : nullptr;
      Device(op, g).linear(from, raw, channels, first, second, constant, center, to, p.rows());
    });
  }

  static Tensor batch_norm_vectors(
      Tensor gamma, Tensor beta, Tensor mean, Tensor variance, double eps, double pixels) {
    const char* op = "batch_norm_vectors";
    if (!gamma.defined()) refuse(op, ": gamma must be a vector, got no tensor");
    const int64_t channels = gamma.numel();
    const std::vector<int64_t> shape{7, channels};
    const Tensor made = torch::stable::empty(
        shape, wide_type(gamma), std::nullopt, gamma.device(), std::nullopt, MemoryFormat::Contiguous);
    by_type(op, gamma, [&](auto element) {
      using E = decltype(element);
      using A = typename Wide<E>::type;
      const E* factor = parameter<E>(op, "gamma", gamma, channels, gamma);
      const E* constant = parameter<E>(op, "beta", beta, channels, gamma);
      const A* center = vector<A>(op, "mean", mean, channels, gamma);
      const A* spread = vector<A>(op, "variance", variance, channels, gamma);
      Device(op, gamma).batch_norm_vectors(
          factor, constant, center, spread, static_cast<A>(eps), static_cast<A>(pixels), channels,
          static_cast<A*>(made.data_ptr()));
    });
    return made;
  }

  static Tensor max_pool2d(Tensor x, int64_t kernel, int64_t stride, int64_t padding) {
    const char* op = "max_pool2d";
    const Pool pool = pool_of(op, x, kernel, stride, padding);
    const Tensor out = pixels_like(x, pool.out_height, pool.out_width);
    by_type(op, x, [&](auto element) {
      using E = decltype(element);
      Device(op, x).max_pool(
          static_cast<const E*>(x.data_ptr()), static_cast<E*>(out.data_ptr()), pool, x.size(0));
    });
    return out;
  }

  static Tensor max_pool2d_backward(Tensor grad, Tensor x, int64_t kernel, int64_t stride, int64_t padding) {
    const char* op = "max_pool2d_backward";
    const Pool pool = pool_of(op, x, kernel, stride, padding);
    pooled_must(op, grad, x, pool);
    const Tensor made = pixels_like(x, pool.height, pool.width);
    by_type(op, x, [&](auto element) {
      using E = decltype(element);
      Device(op, x).max_pool_backward(
          static_cast<const E*>(grad.data_ptr()), static_cast<const E*>(x.data_ptr()), static_cast<E*>(made.data_ptr()),
          pool, x.size(0));
    });
    return made;
  }

  static Tensor avg_pool2d(
      Tensor x, std::optional<Tensor> scale, std::optional<Tensor> shift, double activation, int64_t kernel) {
    const char* op = "avg_pool2d";
    const Pool pool = pool_of(op, x, kernel, kernel, 0);
    if (scale.has_value() != shift.has_value()) refuse(op, ": scale and shift must come together");
    const Tensor out = pixels_like(x, pool.out_height, pool.out_width);
    by_type(op, x, [&](auto element) {
      using E = decltype(element);
      using A = typename Wide<E>::type;
      const auto act = range_of<A>(op, activation);
      const A* factor = scale ? vector<A>(op, "scale", *scale, pool.channels, x) : nullptr;
      const A* constant = shift ? vector<A>(op, "shift", *shift, pool.channels, x) : nullptr;
      Device(op, x).avg_pool(
          static_cast<const E*>(x.data_ptr()), factor, constant, act, static_cast<E*>(out.data_ptr()), pool, x.size(0));
    });
    return out;
  }

  static Tensor spread_mask_sums(
      Tensor grad, Tensor z, Tensor scale, Tensor shift, Tensor mean, Tensor rstd, double activation, int64_t kernel,
      Tensor out) {
    const char* op = "spread_mask_sums";
    const Pool pool = pool_of(op, z, kernel, kernel, 0);
    pooled_must(op, grad, z, pool);
    if (row_stride(op, "out", out, z, pixels_of(op, "z", z)) != pool.channels || out.size(1) != pool.channels)
      refuse(op, ": out must be channels_last with ", pool.channels, " channels, got shape ", listed(out.sizes()));
    const Tensor sums = two_vectors(z, pool.channels);
    by_type(op, z, [&](auto element) {
      using E = decltype(element);
      using A = typename Wide<E>::type;
      const auto act = range_of<A>(op, activation);
      const auto norm = norm_of<A>(op, scale, shift, mean, rstd, pool.channels, z);
      Device(op, z).spread_mask_sums(
          static_cast<const E*>(grad.data_ptr()), static_cast<const E*>(z.data_ptr()), norm, act,
          static_cast<E*>(out.data_ptr()), pool, z.size(0), static_cast<A*>(sums.data_ptr()));
    });
    return sums;
  }

  // Registers those of every device: STABLE_TORCH_LIBRARY_IMPL(name, key, m) { Operators<Device>::implement(m); }
  template <class Library>
  static void implement(Library& m) {
    m.impl("gather", TORCH_BOX(&Operators::gather));
    m.impl("moments", TORCH_BOX(&Operators::moments));
    m.impl("mask_sums", TORCH_BOX(&Operators::mask_sums));
    m.impl("send", TORCH_BOX(&Operators::send));
    m.impl("linear", TORCH_BOX(&Operators::linear));
    m.impl("batch_norm_vectors", TORCH_BOX(&Operators::batch_norm_vectors));
    m.impl("max_pool2d", TORCH_BOX(&Operators::max_pool2d));
    m.impl("max_pool2d_backward", TORCH_BOX(&Operators::max_pool2d_backward));
  }

  // Registers those of GPUs alone.
  template <class Library>
  static void implement_averages(Library& m) {
    m.impl("avg_pool2d", TORCH_BOX(&Operators::avg_pool2d));
    m.impl("spread_mask_sums", TORCH_BOX(&Operators::spread_mask_sums));
  }
};

}  // namespace thresholdnet
