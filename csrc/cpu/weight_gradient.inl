// The loops of weight_gradient.h. Included behind rows.inl and products.inl, once per instruction set, with
// WEIGHT_GRADIENTS defined. Outer products are of ROWS outputs and two vectors of channels.
#include "weight_gradient.h"

namespace thresholdnet {
namespace {

constexpr int64_t OUTPUTS = 128;  // that are added up from what was packed: their dz stays in the second-level cache

// The channels [channel, channel + held) of all parts, of the pixels [first, last), `pitch` apart; zeros fill them up.
template <class A>
void pack_panel(
    const Correlation<A>& call, int64_t channel, int64_t held, int64_t pitch, int64_t first, int64_t last, A* to) {
  if (held < pitch) std::memset(to, 0, (last - first) * pitch * sizeof(A));
  int64_t start = 0;
  for (int64_t k = 0; k < call.count && start < channel + held; start += call.parts[k++].channels) {
    const Part<A>& part = call.parts[k];
    const int64_t from = start < channel ? channel - start : 0;
    const int64_t end = channel + held - start < part.channels ? channel + held - start : part.channels;
    if (from >= end) continue;
    A* out = to + (start + from - channel);
    const A* in = part.in.data + first * part.in.stride + from;
    const A *scale = part.scale ? part.scale + from : nullptr, *shift = part.scale ? part.shift + from : nullptr;
    for (int64_t p = first; p < last; ++p, in += part.in.stride, out += pitch) {
      __builtin_prefetch(in + 16 * part.in.stride);
      lanes<A>(end - from, [&](int64_t c, auto width) {
        constexpr int W = decltype(width)::value;
        auto value = load<W>(in + c);
        if (scale) value = clamp(value * load<W>(scale + c) + load<W>(shift + c), call.act);
        store<W>(out + c, value);
      });
    }
  }
}

// One tap's sums of R outputs over the rows [first, last), where dz starts; `packed` starts at the row `from`.
template <int R, int V, class A>
void add_tap(
    const Correlation<A>& call, const A* packed, const A* dz, int64_t from, int64_t first, int64_t last, int64_t i,
    int64_t j, A* found, int64_t panel) {
  constexpr int64_t pitch = V * LANES_OF<A>;
  const int64_t width = call.width, stride = call.dz.stride;
  const int64_t down = i * call.dilation - call.reach(), across = j * call.dilation - call.reach();
  Sums<R, V, A> sums;
  load_sums(sums, found, panel);
  if (call.kernel == 1) {
    add_products(sums, dz, stride, packed + (first - from) * width * pitch, pitch, (last - first) * width);
  } else {
    const int64_t begin = across < 0 ? -across : 0, end = across > 0 ? width - across : width;
    for (int64_t row = first, y = first % call.height; row < last; ++row, y = y + 1 < call.height ? y + 1 : 0) {
      if (y + down < 0 || y + down >= call.height || begin >= end) continue;
      const A* a = packed + ((row + down - from) * width + begin + across) * pitch;
      add_products(sums, dz + ((row - first) * width + begin) * stride, stride, a, pitch, end - begin);
    }
  }
  store_sums(sums, found, panel);
}

// All taps of `outputs` <= R outputs.
template <int R, int V, class A>
void add_taps(
    const Correlation<A>& call, const A* packed, const A* dz, int64_t from, int64_t first, int64_t last,
    int64_t outputs, A* found, int64_t panel) {
  if constexpr (R > 0) {
    if (outputs < R) return add_taps<R - 1, V>(call, packed, dz, from, first, last, outputs, found, panel);
    for (int64_t tap = 0; tap < call.taps(); ++tap, found += call.outputs * panel)
      add_tap<R, V>(call, packed, dz, from, first, last, tap / call.kernel, tap % call.kernel, found, panel);
  }
}

// One panel and the outputs [o, end), over the rows [first, last).
template <class A>
void add_panel(
    const Correlation<A>& call, int64_t channel, int64_t o, int64_t end, int64_t first, int64_t last, A* packed,
    A* sums) {
  constexpr int64_t L = LANES_OF<A>, panel = 2 * L;
  const int64_t left = call.channels - channel, held = left < panel ? left : panel, pitch = held > L ? panel : L;
  const int64_t reach = call.reach(), from = first > reach ? first - reach : 0;
  const int64_t to = last + reach < call.rows ? last + reach : call.rows;
  pack_panel(call, channel, held, pitch, from * call.width, to * call.width, packed);
  for (int64_t blocks = (end - o + ROWS - 1) / ROWS; blocks > 0; --blocks) {  // as even as can be
    const int64_t outputs = (end - o + blocks - 1) / blocks;
    const A* dz = call.dz.data + first * call.width * call.dz.stride + o;
    if (pitch == panel) add_taps<ROWS, 2>(call, packed, dz, from, first, last, outputs, sums + o * panel, panel);
    else add_taps<ROWS, 1>(call, packed, dz, from, first, last, outputs, sums + o * panel, panel);
    o += outputs;
  }
}

template <class A>
void accumulate_panels(
    const Correlation<A>& call, int64_t begin, int64_t end, int64_t first, int64_t last, A* packed, A* sums) {
  constexpr int64_t panel = 2 * LANES_OF<A>;
  const int64_t step = call.rows_together(), size = call.taps() * call.outputs * panel;
  std::memset(sums, 0, (end - begin) * size * sizeof(A));
  for (int64_t o = 0, groups = (call.outputs + OUTPUTS - 1) / OUTPUTS; groups > 0; --groups) {
    const int64_t stop = o + (call.outputs - o + groups - 1) / groups;
    for (int64_t row = first; row < last; row += step) {
      const int64_t below = row + step < last ? row + step : last;
      for (int64_t k = begin; k < end; ++k)
        add_panel(call, k * panel, o, stop, row, below, packed, sums + (k - begin) * size);
    }
    o = stop;
  }
}

}  // namespace

extern const WeightGradients WEIGHT_GRADIENTS = {
    {2 * LANES_OF<float>, accumulate_panels<float>}, {2 * LANES_OF<double>, accumulate_panels<double>}};

}  // namespace thresholdnet
