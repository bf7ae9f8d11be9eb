// The operator `linked_conv2d` on the CPU (few_pixels.h): checks, and outputs shared among threads.
#define TORCH_TARGET_VERSION 0x020a000000000000  // as in ../ops.cpp
#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "../operators.h"
#include "choose.h"
#include "few_pixels.h"

namespace thresholdnet {
namespace {

constexpr int64_t GRAIN = 32768;  // multiply-adds that are worth a thread
constexpr int64_t SHARE = 8;      // outputs that go to a thread together, at least

template <class A>
const Convolution<A>& convolutions() {
#if defined(__x86_64__)
  static const Convolutions& found = chosen(baseline_convolutions, avx2_convolutions, avx512_convolutions);
#else
  static const Convolutions& found = baseline_convolutions;
#endif
  if constexpr (sizeof(A) == sizeof(double)) return found.f64;
  else return found.f32;
}

template <class A>
void convolve(const FewPixels<A>& call, A* out) {
  const Part<A>& first = call.parts[0];
  const bool whole = call.count == 1 && !first.scale && first.in.stride == call.channels;
  const std::unique_ptr<A[]> room(whole ? nullptr : new A[call.rows() * call.channels]);
  if (!whole) convolutions<A>().gather(call, room.get());
  const A* gathered = whole ? first.in.data : room.get();
  const int64_t work = SHARE * call.kernel.taps() * call.channels * call.rows();
  const int64_t shares = (call.outputs + SHARE - 1) / SHARE, grain = std::max<int64_t>(1, GRAIN / work);
  torch::stable::parallel_for(0, shares, grain, [&](int64_t begin, int64_t end) {
    convolutions<A>().convolve(call, gathered, out, begin * SHARE, std::min(call.outputs, end * SHARE));
  });
}

Tensor linked_conv2d(
    Tensors sources, std::optional<Tensor> scale, std::optional<Tensor> shift, double activation, Tensor weight,
    std::optional<Tensor> bias) {
  const char* op = "linked_conv2d";
  if (sources.empty()) refuse(op, ": sources must be tensors of pixels, got none");
  const Tensor& like = sources[0];
  const Pixels p = pixels_of(op, "source 0", like);
  const int64_t channels = channels_of(op, sources, like, p);
  const Pixels taps = pixels_of(op, "weight", weight);
  const int64_t outputs = taps.n;
  const bool even = taps.h % 2 == 0 || taps.w % 2 == 0;
  if (even || weight.size(1) != channels || outputs == 0 || channels == 0 || p.rows() == 0)
    refuse(
        op, ": sources and weight must have pixels, as many channels and odd kernels, got ", channels,
        " channels and weight ", listed(weight.sizes()));
  if (row_stride(op, "weight", weight, like, {outputs, taps.h, taps.w}) != channels)
    refuse(op, ": weight must be channels_last, got a slice of channels");
  const std::vector<int64_t> shape{p.n, outputs, p.h, p.w};
  const Tensor out = torch::stable::empty(
      shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt, MemoryFormat::ChannelsLast);
  by_exact_type(op, like, [&](auto element) {
    using E = decltype(element);
    const auto parts = affine_parts<E>(op, sources, scale, shift, like, p);
    const auto act = range_of<E>(op, activation);
    const E* constant = bias ? vector<E>(op, "bias", *bias, outputs, like) : nullptr;
    convolve<E>(
        {parts.data(), static_cast<int64_t>(parts.size()), channels, act, p.n, p.h, p.w, {taps.h, taps.w}, outputs,
         static_cast<const E*>(weight.data_ptr()), constant},
        static_cast<E*>(out.data_ptr()));
  });
  return out;
}

}  // namespace
}  // namespace thresholdnet

STABLE_TORCH_LIBRARY_FRAGMENT(thresholdnet_csrc, m) {
  // conv2d, padding (h, w) / 2, of act(the sources side by side * scale + shift), or of the sources without a scale;
  // with a bias act(it + bias). For few pixels: float32 and float64.
  m.def(
      "linked_conv2d(Tensor[] sources, Tensor? scale, Tensor? shift, float activation, Tensor weight, Tensor? bias) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(thresholdnet_csrc, CPU, m) { m.impl("linked_conv2d", TORCH_BOX(&thresholdnet::linked_conv2d)); }
