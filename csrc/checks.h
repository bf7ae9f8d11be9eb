// Argument checks of the operators: one sentence each, with the operator, the argument, what is required, what came.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

#include "types.h"

namespace thresholdnet {

using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] inline void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

template <class List>
inline std::string listed(const List& values) {
  std::ostringstream text;
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "[") << values[i];
  text << (values.size() ? "]" : "[]");
  return text.str();
}

template <class A>
Range<A> range_of(const char* op, double activation) {
  constexpr A infinity = std::numeric_limits<A>::infinity();
  if (activation == 0) return {-infinity, infinity, 0};
  if (activation == 1) return {0, infinity, 0};
  if (activation == 2) return {0, 6, 0};
  if (activation > 0 && activation < 1) return {0, infinity, static_cast<A>(activation)};
  refuse(op, ": activation must be 0 (none), 1 (ReLU), 2 (ReLU6) or a slope between 0 and 1, got ", activation);
}

// N, H and W of the call: every tensor of pixels must share them.
struct Pixels {
  int64_t n, h, w;
  int64_t rows() const { return n * h * w; }
};

inline Pixels pixels_of(const char* op, const char* name, const Tensor& t) {
  if (t.dim() != 4) refuse(op, ": ", name, " must have 4 dimensions, got shape ", listed(t.sizes()));
  return {t.size(0), t.size(2), t.size(3)};
}

inline std::string place_of(const Tensor& t) {
  if (t.is_cpu()) return "the CPU";
  return (t.is_cuda() ? "GPU " : "device ") + std::to_string(t.get_device_index());
}

inline void same_device(const char* op, const std::string& name, const Tensor& t, const Tensor& like) {
  if (t.device() != like.device()) {
    refuse(op, ": ", name, " must lie on ", place_of(like), " as the other tensors do, got one on ", place_of(t));
  }
}

// Elements from one pixel to the next. Refuses another shape, type, device, or an order that is not channels_last.
inline int64_t row_stride(const char* op, const std::string& name, const Tensor& t, const Tensor& like, Pixels p) {
  if (t.dim() != 4 || t.size(0) != p.n || t.size(2) != p.h || t.size(3) != p.w)
    refuse(op, ": ", name, " must have shape [", p.n, ", C, ", p.h, ", ", p.w, "], got ", listed(t.sizes()));
  if (t.scalar_type() != like.scalar_type()) refuse(op, ": ", name, " must have the dtype of the other tensors");
  same_device(op, name, t, like);
  const int64_t c = t.size(1);
  if (p.rows() == 0 || c == 0) return c;
  const int64_t stride = p.w > 1 ? t.stride(3) : p.h > 1 ? t.stride(2) : p.n > 1 ? t.stride(0) : c;
  const bool even = (c == 1 || t.stride(1) == 1) && stride >= c && (p.h == 1 || t.stride(2) == p.w * stride) &&
      (p.n == 1 || t.stride(0) == p.h * p.w * stride);
  if (!even) {
    refuse(
        op, ": ", name, " must be channels_last, or a channel slice of a channels_last tensor, got shape ",
        listed(t.sizes()), " with strides ", listed(t.strides()));
  }
  return stride;
}

inline void vector_of(
    const char* op, const std::string& name, const Tensor& t, int64_t length, torch::headeronly::ScalarType wide) {
  if (t.dim() != 1 || t.size(0) != length || !t.is_contiguous() || t.scalar_type() != wide) {
    refuse(
        op, ": ", name, " must be a contiguous vector of ", length,
        " elements, float32 (float64 for float64 pixels), got shape ", listed(t.sizes()));
  }
}

inline void channels_must(const char* op, const char* name, const Tensor& t, int64_t channels) {
  if (t.size(1) != channels) refuse(op, ": ", name, " must have ", channels, " channels, got ", t.size(1));
}

inline void same_count(const char* op, const char* name, size_t got, size_t wanted) {
  if (got != wanted) refuse(op, ": ", name, " must hold ", wanted, " tensors, one a source, got ", got);
}

}  // namespace thresholdnet
