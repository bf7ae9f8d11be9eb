// Operators of the library `thresholdnet_csrc` for Winograd convolutions on the CPU (winograd.h): checks and threads.
// Pixels are float32, [N, C, H, W] in channels_last order as in ../ops.cpp. A transformed tensor is contiguous,
// [blocks, 36, TILES, C]. Every sum is taken in one order, whatever the number of threads.
#define TORCH_TARGET_VERSION 0x020a000000000000  // as in ../ops.cpp
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../checks.h"
#include "choose.h"
#include "winograd.h"

namespace thresholdnet {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using Tensors = std::vector<Tensor>;

constexpr int64_t RUN = 64;  // input channels whose weights are transformed in one go

const Winograd& loops() {
#if defined(__x86_64__)
  static const Winograd& found = chosen(baseline_winograd, avx2_winograd, avx512_winograd);
  return found;
#else
  return baseline_winograd;
#endif
}

int64_t padded(int64_t channels, int64_t to) { return (channels + to - 1) / to * to; }

std::string numbered(const char* name, size_t j) { return std::string(name) + " " + std::to_string(j); }

void float_must(const char* op, const std::string& name, const Tensor& t) {
  if (t.scalar_type() != ScalarType::Float || !t.is_cpu()) refuse(op, ": ", name, " must be float32 on the CPU");
}

template <class T>
Rows<T> rows_of(const char* op, const char* name, const Tensor& t, const Tensor& like, Pixels p) {
  const int64_t stride = row_stride(op, name, t, like, p);
  return {static_cast<T*>(t.data_ptr()), stride};
}

// Data of a contiguous tensor of this shape.
float* data_of(const char* op, const std::string& name, const Tensor& t, const std::vector<int64_t>& shape) {
  float_must(op, name, t);
  bool same = t.is_contiguous() && t.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = t.size(i) == shape[i];
  if (!same)
    refuse(op, ": ", name, " must be contiguous with shape ", listed(shape), ", got shape ", listed(t.sizes()));
  return static_cast<float*>(t.data_ptr());
}

// A transformed tensor with this many blocks.
Source source_of(const char* op, const std::string& name, const Tensor& t, int64_t blocks) {
  const int64_t channels = t.dim() == 4 ? t.size(3) : 0;
  return {data_of(op, name, t, {blocks, POSITIONS, TILES, channels}), channels};
}

std::vector<Source> sources_of(const char* op, const Tensors& list, int64_t blocks) {
  std::vector<Source> found;
  for (size_t j = 0; j < list.size(); ++j) found.push_back(source_of(op, numbered("source", j), list[j], blocks));
  return found;
}

int64_t channels_of(const std::vector<Source>& list) {
  int64_t total = 0;
  for (const Source& source : list) total += source.channels;
  return total;
}

Tensor floats(const std::vector<int64_t>& shape, const Tensor& like) {
  return torch::stable::empty(
      shape, ScalarType::Float, std::nullopt, like.device(), std::nullopt, MemoryFormat::Contiguous);
}

template <class F>
void for_each(int64_t count, int64_t grain, const F& f) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) f(k);
  });
}

void transform(Tensor x, bool gradient, Tensor out) {
  const char* op = "winograd_transform";
  const Pixels p = pixels_of(op, "x", x);
  float_must(op, "x", x);
  const Rows<const float> from = rows_of<const float>(op, "x", x, x, p);
  const Grid grid(p.n, p.h, p.w);
  const int64_t channels = x.size(1), width = gradient ? padded(channels, GRADIENT_PAD) : channels;
  float* to = data_of(op, "out", out, {grid.blocks(), POSITIONS, TILES, width});
  const std::vector<float> zeros(channels);
  for_each(grid.blocks(), 1, [&](int64_t block) {
    float* place = to + block * POSITIONS * TILES * width;
    if (gradient) loops().transform_gradient(from, channels, grid, zeros.data(), place, width, block);
    else loops().transform(from, channels, grid, zeros.data(), place, block);
  });
}

Tensor weights(Tensors list, bool transposed) {
  const char* op = "winograd_weights";
  const int64_t in = transposed ? 0 : 1, out = 1 - in, outputs = list[0].dim() == 4 ? list[0].size(out) : 0;
  std::vector<Taps> entries;
  for (size_t j = 0; j < list.size(); ++j) {
    const Tensor& w = list[j];
    float_must(op, numbered("weight", j), w);
    if (w.dim() != 4 || w.size(2) != 3 || w.size(3) != 3 || w.size(out) != outputs) {
      refuse(
          op, ": ", numbered("weight", j), " must have shape [O, C, 3, 3], with one ", transposed ? "C" : "O",
          " for all of them, got ", listed(w.sizes()));
    }
    const int64_t row = w.stride(2), column = w.stride(3), turn = transposed ? -1 : 1;
    const float* first = static_cast<const float*>(w.data_ptr()) + (transposed ? 2 * (row + column) : 0);
    for (int64_t k = 0; k < w.size(in); ++k)
      entries.push_back({first + k * w.stride(in), w.stride(out), turn * row, turn * column});
  }
  const Packed shape{static_cast<int64_t>(entries.size()), padded(outputs, loops().lanes)};
  const Tensor packed = floats({POSITIONS, shape.entries, shape.outputs}, list[0]);
  float* to = static_cast<float*>(packed.data_ptr());
  const int64_t vectors = shape.outputs / loops().lanes, runs = (shape.entries + RUN - 1) / RUN;
  for_each(vectors * runs, 1, [&](int64_t k) {
    const int64_t first = k % runs * RUN, last = std::min(shape.entries, first + RUN);
    loops().pack(entries.data(), first, last, k / runs * loops().lanes, outputs, shape, to);
  });
  return packed;
}

void convolve(
    Tensors sources, Tensor packed, std::optional<Tensor> bias, std::optional<Tensor> add, double activation,
    Tensor out) {
  const char* op = "winograd_conv";
  const Pixels p = pixels_of(op, "out", out);
  float_must(op, "out", out);
  const Rows<float> to = rows_of<float>(op, "out", out, out, p);
  const Grid grid(p.n, p.h, p.w);
  const std::vector<Source> from = sources_of(op, sources, grid.blocks());
  const int64_t outputs = out.size(1);
  const Packed shape{channels_of(from), padded(outputs, loops().lanes)};
  const float* weights = data_of(op, "weights", packed, {POSITIONS, shape.entries, shape.outputs});
  if (bias) vector_of(op, "bias", *bias, outputs, ScalarType::Float);
  const Rows<const float> added = add ? rows_of<const float>(op, "add", *add, out, p) : Rows<const float>();
  if (add) channels_must(op, "add", *add, outputs);
  const Finish finish{
      bias ? static_cast<const float*>(bias->data_ptr()) : nullptr, added, range_of<float>(op, activation)};
  if (outputs == 0) return;
  // groups of outputs as even as whole vectors allow
  const int64_t lanes = 2 * loops().lanes, groups = (outputs + GROUP - 1) / GROUP;
  const int64_t width = padded((outputs + groups - 1) / groups, lanes);
  torch::stable::parallel_for(0, groups * grid.blocks(), 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> products(new float[POSITIONS * TILES * width]);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = k % groups * width, last = std::min(outputs, first + width);
      if (first >= last) continue;
      loops().convolve(
          from.data(), static_cast<int64_t>(from.size()), weights, shape, first, last, grid, k / groups, finish,
          products.get(), to);
    }
  });
}

Tensor weight_gradient(Tensors sources, Tensor gradient, int64_t outputs) {
  const char* op = "winograd_weight_gradient";
  const int64_t blocks = gradient.dim() == 4 ? gradient.size(0) : 0;
  const Source arriving = source_of(op, "gradient", gradient, blocks);
  if (outputs < 0 || outputs > arriving.channels || arriving.channels != padded(outputs, GRADIENT_PAD)) {
    refuse(
        op, ": gradient must have the channels of `outputs`, padded to a multiple of ", GRADIENT_PAD, ", got ",
        arriving.channels, " for ", outputs, " outputs");
  }
  const std::vector<Source> from = sources_of(op, sources, blocks);
  const int64_t entries = channels_of(from), stride = padded(outputs, loops().lanes), plane = entries * stride;
  std::vector<int64_t> start;
  for (int64_t j = 0, channels = 0; j < static_cast<int64_t>(from.size()); channels += from[j++].channels)
    start.push_back(channels);
  const Tensor dw = floats({outputs, entries, 3, 3}, gradient);
  const std::unique_ptr<float[]> sums(new float[POSITIONS * plane]);
  const int64_t count = static_cast<int64_t>(from.size());
  for_each(POSITIONS * count, 1, [&](int64_t task) {
    const int64_t f = task / count, j = task % count;
    loops().correlate(from[j], arriving, blocks, f, outputs, sums.get() + f * plane + start[j] * stride);
  });
  float* to = static_cast<float*>(dw.data_ptr());
  for_each(entries, 16, [&](int64_t k) {
    loops().finish_gradient(sums.get() + k * stride, plane, outputs, to + 9 * k, 9 * entries);
  });
  return dw;
}

}  // namespace
}  // namespace thresholdnet

STABLE_TORCH_LIBRARY_FRAGMENT(thresholdnet_csrc, m) {
  // out [blocks, 36, TILES, C] = B^T d B of x's tiles; with `gradient` A d A^T, channels padded to a multiple of 16.
  m.def("winograd_transform(Tensor x, bool gradient, Tensor(a!) out) -> ()");

  // G w G^T of weights [O, C_j, 3, 3] side by side in C, as this machine's winograd_conv reads them; `transposed`: of
  // weights [O_j, C, 3, 3] that read one tensor, for the gradient of that tensor, side by side in O.
  m.def("winograd_weights(Tensor[] weights, bool transposed) -> Tensor");

  // out [N, O, H, W] = act(the 3x3 convolution of the transformed sources side by side + bias + add).
  m.def(
      "winograd_conv(Tensor[] sources, Tensor weights, Tensor? bias, Tensor? add, float activation, Tensor(a!) out) "
      "-> ()");

  // [outputs, K, 3, 3]: the weight's gradient from the transformed sources and gradient.
  m.def("winograd_weight_gradient(Tensor[] sources, Tensor gradient, int outputs) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(thresholdnet_csrc, CPU, m) {
  m.impl("winograd_transform", TORCH_BOX(&thresholdnet::transform));
  m.impl("winograd_weights", TORCH_BOX(&thresholdnet::weights));
  m.impl("winograd_conv", TORCH_BOX(&thresholdnet::convolve));
  m.impl("winograd_weight_gradient", TORCH_BOX(&thresholdnet::weight_gradient));
}
