// The loops of weight_gradient.h. Included behind winograd.inl, once per instruction set, with WEIGHT_GRADIENTS defined.
//
// Sums are kept in registers as in winograd.inl: ROWS outputs times two vectors of channels.
#include "weight_gradient.h"

namespace thresholdnet {
namespace {

constexpr int64_t TOGETHER = 256;  // pixels that are packed at once, about
constexpr int64_t OUTPUTS = 128;   // and outputs that are added up from them: their dz stays in the second-level cache

template <class A>
constexpr int64_t LANES_OF = VECTOR / sizeof(A);

// Rows of pixels that are packed at once.
template <class E>
INLINE int64_t rows_together(const Correlation<E>& call) {
  return call.width < TOGETHER ? TOGETHER / call.width : 1;
}

template <class E>
int64_t scratch_size(const Correlation<E>& call) {  // a panel's channels with the rows above and below, and dz
  const int64_t rows = rows_together(call);
  return ((rows + call.kernel - 1) * 2 * LANES_OF<typename Wide<E>::type> + rows * OUTPUTS) * call.width;
}

// The channels [channel, channel + held) of all parts, of the pixels [first, last), `pitch` apart; zeros fill them up.
template <class E, class A>
void pack_panel(
    const Correlation<E>& call, int64_t channel, int64_t held, int64_t pitch, int64_t first, int64_t last, A* to) {
  if (held < pitch) std::memset(to, 0, (last - first) * pitch * sizeof(A));
  int64_t start = 0;
  for (int64_t k = 0; k < call.count && start < channel + held; start += call.parts[k++].channels) {
    const Part<E>& part = call.parts[k];
    const int64_t from = start < channel ? channel - start : 0;
    const int64_t end = channel + held - start < part.channels ? channel + held - start : part.channels;
    if (from >= end) continue;
    A* out = to + (start + from - channel);
    const E* in = part.in.data + first * part.in.stride + from;
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

// sums[R, V vectors] += dz x a over `count` pixels.
template <int R, int V, class A>
INLINE void outer_products(
    const A* a, const A* dz, int64_t stride, int64_t count, Vec<A, LANES_OF<A>> (&sums)[R][V]) {
  constexpr int L = LANES_OF<A>;
  for (int64_t p = 0; p < count; ++p, a += V * L, dz += stride) {
    Vec<A, L> value[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) value[v] = load<L>(a + v * L);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[r][v] += dz[r] * value[v];
    }
  }
}

// One tap's sums of R outputs over the rows [first, last), where dz starts; `packed` starts at the row `from`.
template <int R, int V, class A>
void add_tap(
    const Correlation<A>& call, const A* packed, Rows<const A> dz, int64_t from, int64_t first, int64_t last, int64_t i,
    int64_t j, A* found, int64_t panel) {
  constexpr int L = LANES_OF<A>;
  const int64_t width = call.width, stride = dz.stride, down = i - call.kernel / 2, across = j - call.kernel / 2;
  Vec<A, L> sums[R][V];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[r][v] = load<L>(found + r * panel + v * L);
  }
  if (call.kernel == 1) {
    outer_products<R, V>(packed + (first - from) * width * V * L, dz.data, stride, (last - first) * width, sums);
  } else {
    const int64_t begin = across < 0 ? -across : 0, end = across > 0 ? width - across : width;
    for (int64_t row = first, y = first % call.height; row < last; ++row, y = y + 1 < call.height ? y + 1 : 0) {
      if (y + down < 0 || y + down >= call.height || begin >= end) continue;
      const A* a = packed + ((row + down - from) * width + begin + across) * V * L;
      outer_products<R, V>(a, dz.data + ((row - first) * width + begin) * stride, stride, end - begin, sums);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store<L>(found + r * panel + v * L, sums[r][v]);
  }
}

// All taps of `outputs` <= R outputs.
template <int R, int V, class A>
void add_taps(
    const Correlation<A>& call, const A* packed, Rows<const A> dz, int64_t from, int64_t first, int64_t last,
    int64_t outputs, A* found, int64_t panel) {
  if constexpr (R > 0) {
    if (outputs < R) return add_taps<R - 1, V>(call, packed, dz, from, first, last, outputs, found, panel);
    for (int64_t tap = 0; tap < call.taps(); ++tap, found += call.outputs * panel)
      add_tap<R, V>(call, packed, dz, from, first, last, tap / call.kernel, tap % call.kernel, found, panel);
  }
}

// One panel and `outputs` outputs, over the rows [first, last), where dz starts.
template <class A>
void add_panel(
    const Correlation<A>& call, int64_t channel, Rows<const A> dz, int64_t outputs, int64_t first, int64_t last,
    A* packed, A* sums) {
  constexpr int64_t L = LANES_OF<A>, panel = 2 * L;
  const int64_t left = call.channels - channel, held = left < panel ? left : panel, pitch = held > L ? panel : L;
  const int64_t reach = call.kernel / 2, from = first > reach ? first - reach : 0;
  const int64_t to = last + reach < call.rows ? last + reach : call.rows;
  pack_panel(call, channel, held, pitch, from * call.width, to * call.width, packed);
  for (int64_t blocks = (outputs + ROWS - 1) / ROWS, o = 0; blocks > 0; --blocks) {  // as even as can be
    const int64_t some = (outputs - o + blocks - 1) / blocks;
    const Rows<const A> arriving{dz.data + o, dz.stride};
    if (pitch == panel) add_taps<ROWS, 2>(call, packed, arriving, from, first, last, some, sums + o * panel, panel);
    else add_taps<ROWS, 1>(call, packed, arriving, from, first, last, some, sums + o * panel, panel);
    o += some;
  }
}

// Copy rows of `count` pixels close together: at strides of a page they would share a few lines of each cache.
template <class A>
Rows<const A> close_together(Rows<const A> dz, int64_t outputs, int64_t count, A* to) {
  for (int64_t p = 0; p < count; ++p) {
    lanes<A>(outputs, [&](int64_t o, auto width) {
      constexpr int W = decltype(width)::value;
      store<W>(to + p * outputs + o, load<W>(dz.data + p * dz.stride + o));
    });
  }
  return {to, outputs};
}

template <class A>
void accumulate_panels(
    const Correlation<A>& call, int64_t begin, int64_t end, int64_t first, int64_t last, A* scratch, A* sums) {
  constexpr int64_t panel = 2 * LANES_OF<A>;
  const int64_t step = rows_together(call), size = call.taps() * call.outputs * panel;
  A* copied = scratch + (step + call.kernel - 1) * call.width * panel;
  std::memset(sums, 0, (end - begin) * size * sizeof(A));
  for (int64_t o = 0, groups = (call.outputs + OUTPUTS - 1) / OUTPUTS; groups > 0; --groups) {
    const int64_t outputs = (call.outputs - o + groups - 1) / groups;
    for (int64_t row = first; row < last; row += step) {
      const int64_t stop = row + step < last ? row + step : last;
      Rows<const A> dz{call.dz.data + row * call.width * call.dz.stride + o, call.dz.stride};
      if (dz.stride > OUTPUTS) dz = close_together(dz, outputs, (stop - row) * call.width, copied);
      for (int64_t k = begin; k < end; ++k)
        add_panel(call, k * panel, dz, outputs, row, stop, scratch, sums + (k - begin) * size + o * panel);
    }
    o += outputs;
  }
}

template <class E>
constexpr WeightGradient<E> weight_gradient_loops() {
  return {2 * LANES_OF<E>, scratch_size<E>, accumulate_panels<E>};
}

}  // namespace

extern const WeightGradients WEIGHT_GRADIENTS = {weight_gradient_loops<float>(), weight_gradient_loops<double>()};

}  // namespace thresholdnet
