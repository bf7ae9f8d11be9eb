// The operator `weight_gradient` on the CPU (weight_gradient.h): checks, tasks, and their sums merged in a fixed order.
#define TORCH_TARGET_VERSION 0x020a000000000000  // as in ../ops.cpp
#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "../operators.h"
#include "choose.h"
#include "weight_gradient.h"

namespace thresholdnet {
namespace {

constexpr int64_t SPLITS = 8;          // of the pixels: each has sums of its own
constexpr int64_t LEAST = 1024;        // pixels a task, or zeroing and merging its sums would count
constexpr int64_t GRAIN = 131072;      // multiply-adds that are worth a thread
constexpr int64_t LARGEST = 31;        // pixels of a kernel's side
constexpr int64_t FARTHEST = 1 << 20;  // pixels between two taps

template <class E>
const WeightGradient<E>& loops() {
#if defined(__x86_64__)
  static const WeightGradients& found =
      chosen(baseline_weight_gradients, avx2_weight_gradients, avx512_weight_gradients, avx512_bf16_weight_gradients);
#else
  static const WeightGradients& found = baseline_weight_gradients;
#endif
  if constexpr (std::is_same_v<E, double>) return found.f64;
  else if constexpr (std::is_same_v<E, bfloat16>) return found.bf16;
  else return found.f32;
}

int64_t ratio_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

class Room {  // memory that begins with a cache line
 public:
  explicit Room(int64_t bytes) : held(new char[bytes + LINE]) {}
  void* start() const {
    const auto at = reinterpret_cast<uintptr_t>(held.get());
    return held.get() + (LINE - at % LINE);
  }

 private:
  static constexpr int64_t LINE = 64;
  std::unique_ptr<char[]> held;
};

template <class E>
E narrowed(typename Wide<E>::type value) { return value; }
template <>
bfloat16 narrowed<bfloat16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};  // to nearest, ties to even
}

template <class E>
void correlate(const Correlation<E>& call, E* dw) {
  using A = typename Wide<E>::type;
  const int64_t panel = loops<E>().panel, panels = ratio_up(call.channels, panel);
  const int64_t most = std::clamp<int64_t>(call.rows * call.width / LEAST, 1, SPLITS);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t share = ratio_up(call.rows, most), splits = ratio_up(call.rows, share);
  const int64_t group = ratio_up(panels, std::min(panels, ratio_up(2 * threads, splits)));
  const int64_t groups = ratio_up(panels, group);
  const int64_t size = call.kernel.taps() * call.outputs * panel;
  const std::unique_ptr<A[]> sums(new A[splits * panels * size]);
  const auto grain = [](int64_t work) { return std::max<int64_t>(1, GRAIN / work); };
  torch::stable::parallel_for(
      0, splits * groups, grain(share * call.width * group * size), [&](int64_t begin, int64_t end) {
        const Room packed(loops<E>().room(call));
        for (int64_t task = begin; task < end; ++task) {
          const int64_t split = task / groups, first = split * share, last = std::min(call.rows, first + share);
          const int64_t from = task % groups * group, to = std::min(panels, from + group);
          A* part = sums.get() + (split * panels + from) * size;
          loops<E>().accumulate(call, from, to, first, last, packed.start(), part);
        }
      });
  const int64_t taps = call.kernel.taps(), row = call.channels * taps;
  torch::stable::parallel_for(0, panels, grain(splits * size), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      A* total = sums.get() + k * size;
      for (int64_t split = 1; split < splits; ++split) {
        const A* more = total + split * panels * size;
        for (int64_t i = 0; i < size; ++i) total[i] += more[i];
      }
      const int64_t channels = std::min(panel, call.channels - k * panel);
      for (int64_t o = 0; o < call.outputs; ++o) {
        const A* from = total + o * panel;
        E* to = dw + o * row + k * panel * taps;
        if (taps == 1) {
          for (int64_t c = 0; c < channels; ++c) *to++ = narrowed<E>(from[c]);
          continue;
        }
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t tap = 0; tap < taps; ++tap) *to++ = narrowed<E>(from[tap * call.outputs * panel + c]);
      }
    }
  });
}

Tensor weight_gradient(
    Tensors sources, std::optional<Tensor> scale, std::optional<Tensor> shift, double activation, Tensor dz,
    int64_t height, int64_t width, int64_t dilation) {
  const char* op = "weight_gradient";
  const Pixels p = pixels_of(op, "dz", dz);
  const int64_t channels = channels_of(op, sources, dz, p), outputs = dz.size(1);
  if (p.rows() == 0 || channels == 0 || outputs == 0)
    refuse(
        op, ": sources and dz must have pixels and channels, got ", channels, " channels and dz ", listed(dz.sizes()));
  for (const int64_t side : {height, width})
    if (side < 1 || side > LARGEST || side % 2 == 0)
      refuse(op, ": a kernel's sides must be odd and at most ", LARGEST, ", got ", height, " x ", width);
  if (dilation < 1 || dilation > FARTHEST)
    refuse(op, ": dilation must be from 1 to ", FARTHEST, ", got ", dilation);
  const std::vector<int64_t> shape{outputs, channels, height, width};
  const Tensor dw = torch::stable::empty(
      shape, dz.scalar_type(), std::nullopt, dz.device(), std::nullopt, MemoryFormat::Contiguous);
  by_type<false>(op, dz, [&](auto element) {
    using E = decltype(element);
    const auto parts = affine_parts<E>(op, sources, scale, shift, dz, p);
    const auto arriving = reading<E>(op, "dz", dz, dz, p);
    const auto act = range_of<typename Wide<E>::type>(op, activation);
    correlate<E>(
        {parts.data(), static_cast<int64_t>(parts.size()), channels, act, arriving, outputs, {height, width}, dilation,
         p.n * p.h, p.h, p.w},
        static_cast<E*>(dw.data_ptr()));
  });
  return dw;
}

}  // namespace
}  // namespace thresholdnet

STABLE_TORCH_LIBRARY_FRAGMENT(thresholdnet_csrc, m) {
  // [O, K, h, w]: the weight's gradient of a convolution, padding (h, w) / 2 * dilation, of act(the sources side by
  // side * scale + shift), or of the sources where there is no scale; dz: [N, O, H, W]. float32, float64, bfloat16.
  m.def(
      "weight_gradient(Tensor[] sources, Tensor? scale, Tensor? shift, float activation, Tensor dz, "
      "int kernel_height, int kernel_width, int dilation=1) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(thresholdnet_csrc, CPU, m) {
  m.impl("weight_gradient", TORCH_BOX(&thresholdnet::weight_gradient));
}
