// The loops of weight_gradient.h. Included behind rows.inl and products.inl, once per instruction set, with
// WEIGHT_GRADIENTS defined. Outer products are of ROWS outputs and two vectors of channels.
//
// What is packed of a channel, and multiplied by the like of dz, is a unit: of float and double a pixel's value, of
// bfloat16 the values of two neighbours in a line, the left one in the low half. A line is a row of pixels, or all rows
// at once where there is one tap. dz is read where it lies, and of bfloat16 packed twice: with pairs that begin at even
// pixels, for taps an even number of pixels across, and with pairs that begin at odd ones.
#include "weight_gradient.h"

namespace thresholdnet {
namespace {

constexpr int64_t OUTPUTS = 128;  // that are added up from what was packed: their dz stays in the second-level cache
constexpr uint32_t LEFT = 0xffffu, RIGHT = 0xffff0000u;  // of a pair

template <class E>
struct UnitOf {
  using type = E;
  static constexpr int64_t PIXELS = 1;
};
template <>
struct UnitOf<bfloat16> {
  using type = uint32_t;
  static constexpr int64_t PIXELS = 2;
};
template <class E>
using Unit = typename UnitOf<E>::type;

struct Lines {  // of pixels
  int64_t count, pixels;
};

// Rows of pixels as lines; those of single pixels are one line anyway.
template <class E>
INLINE Lines lines_of(const Correlation<E>& call, int64_t rows) {
  if (call.kernel.taps() == 1 || UnitOf<E>::PIXELS == 1) return {1, rows * call.width};
  return {rows, call.width};
}

template <class E>
INLINE int64_t units_of(Lines lines) {
  return (lines.pixels + UnitOf<E>::PIXELS - 1) / UnitOf<E>::PIXELS;
}

// A unit of the channels [0, channels), activated where there is a scale; `step` from a pixel to its neighbour.
template <class A>
INLINE void pack_unit(
    const A* in, int64_t, bool, int64_t channels, const A* scale, const A* shift, Range<A> act, A* out) {
  lanes<A>(channels, [&](int64_t c, auto width) {
    constexpr int W = decltype(width)::value;
    auto value = load<W>(in + c);
    if (scale) value = clamp(value * load<W>(scale + c) + load<W>(shift + c), act);
    store<W>(out + c, value);
  });
}

INLINE void pack_unit(
    const bfloat16* in, int64_t step, bool pair, int64_t channels, const float* scale, const float* shift,
    Range<float> act, uint32_t* out) {
  lanes<float>(channels, [&](int64_t c, auto width) {
    constexpr int W = decltype(width)::value;
    const auto bits = [&](const bfloat16* from) {
      if (!scale) return load_bits<W>(from);
      return rounded<W>(clamp(load<W>(from) * load<W>(scale + c) + load<W>(shift + c), act));
    };
    auto unit = widened<W>(bits(in + c));
    if (pair) unit |= widened<W>(bits(in + step + c)) << 16;
    std::memcpy(out + c, &unit, sizeof(unit));
  });
}

// The channels [channel, channel + held) of all parts, of lines from the pixel `first` on; units lie `pitch` apart, and
// zeros fill them up.
template <class E>
void pack_panel(
    const Correlation<E>& call, int64_t channel, int64_t held, int64_t pitch, int64_t first, Lines lines,
    Unit<E>* to) {
  using A = typename Wide<E>::type;
  constexpr int64_t PIXELS = UnitOf<E>::PIXELS;
  if (held < pitch) std::memset(to, 0, lines.count * units_of<E>(lines) * pitch * sizeof(*to));
  int64_t start = 0;
  for (int64_t k = 0; k < call.count && start < channel + held; start += call.parts[k++].channels) {
    const Part<E>& part = call.parts[k];
    const int64_t from = start < channel ? channel - start : 0;
    const int64_t end = channel + held - start < part.channels ? channel + held - start : part.channels;
    if (from >= end) continue;
    Unit<E>* out = to + (start + from - channel);
    const E* in = part.in.data + first * part.in.stride + from;
    const A *scale = part.scale ? part.scale + from : nullptr, *shift = part.scale ? part.shift + from : nullptr;
    for (int64_t line = 0; line < lines.count; ++line) {
      for (int64_t p = 0; p < lines.pixels; p += PIXELS, out += pitch) {
        __builtin_prefetch(in + 16 * part.in.stride);
        const bool pair = p + 1 < lines.pixels;
        pack_unit(in, part.in.stride, pair, end - from, scale, shift, call.act, out);
        in += (PIXELS == 2 && pair ? 2 : 1) * part.in.stride;
      }
    }
  }
}

// dz of some rows and outputs as it is multiplied by what was packed.
template <class E>
struct Factors {
  const E* at;
  int64_t stride;

  static int64_t room(const Correlation<E>&) { return 0; }

  Factors(const Correlation<E>& call, int64_t first, int64_t, int64_t o, int64_t, Unit<E>*)
      : at(call.dz.data + first * call.width * call.dz.stride + o), stride(call.dz.stride) {}

  Factors behind(int64_t outputs) const {
    Factors moved = *this;
    moved.at += outputs;
    return moved;
  }

  // One line's sums; the tap lies `across` pixels to the right.
  template <int R, int V>
  INLINE void add(
      Sums<R, V, E>& sums, int64_t line, int64_t pixels, const E* packed, int64_t pitch, int64_t across) const {
    const int64_t begin = across < 0 ? -across : 0, end = across > 0 ? pixels - across : pixels;
    add_products(
        sums, at + (line * pixels + begin) * stride, stride, packed + (begin + across) * pitch, pitch, end - begin);
  }
};

// sum + the products of both pixels; for the instruction, too, values below 2^-126 are zeros.
template <int W>
INLINE Vec<float, W> add_pair(Vec<float, W> sum, Vec<uint32_t, W> x, Vec<uint32_t, W> y) {
#if defined(HAS_BF16)
  if constexpr (W == 16) return (Vec<float, W>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
#endif
  sum += (Vec<float, W>)(x & RIGHT) * (Vec<float, W>)(y & RIGHT);
  return sum + (Vec<float, W>)(x << 16) * (Vec<float, W>)(y << 16);
}

template <>
struct Factors<bfloat16> {
  static constexpr int W = LANES_OF<float>;
  const uint32_t *even, *odd;  // [lines, units, outputs]: the pixels 2 u and 2 u + 1; 2 u - 1 and 2 u
  int64_t units, stride;

  static int64_t units_in(Lines lines) { return lines.pixels / 2 + 1; }
  static int64_t group(const Correlation<bfloat16>& call) { return call.outputs < OUTPUTS ? call.outputs : OUTPUTS; }
  static int64_t room(const Correlation<bfloat16>& call) {
    const Lines lines = lines_of(call, call.rows_together());
    return 2 * lines.count * units_in(lines) * group(call);
  }

  // Of the rows [first, last) and the outputs [o, end), packed into `to`.
  Factors(const Correlation<bfloat16>& call, int64_t first, int64_t last, int64_t o, int64_t end, uint32_t* to) {
    const Lines lines = lines_of(call, last - first);
    units = units_in(lines), stride = end - o;
    even = to, odd = to + lines.count * units * stride;
    const bool both = call.kernel.width > 1 && call.dilation % 2;
    const int64_t step = call.dz.stride;
    const bfloat16* from = call.dz.data + first * call.width * step + o;
    for (int64_t line = 0; line < lines.count; ++line, from += lines.pixels * step) {
      for (int64_t u = 0; u < units; ++u, to += stride) {
        pack(from, step, lines.pixels, 2 * u, to);
        if (both) pack(from, step, lines.pixels, 2 * u - 1, to + (odd - even));
      }
    }
  }

  // A pair that begins at the pixel p, of which one may lie outside the line.
  INLINE void pack(const bfloat16* from, int64_t step, int64_t pixels, int64_t p, uint32_t* to) const {
    const bool left = p >= 0 && p < pixels, right = p + 1 < pixels;
    lanes<float>(stride, [&](int64_t o, auto width) {
      constexpr int N = decltype(width)::value;
      Vec<uint32_t, N> unit = {};
      if (left) unit = widened<N>(load_bits<N>(from + p * step + o));
      if (right) unit |= widened<N>(load_bits<N>(from + (p + 1) * step + o)) << 16;
      std::memcpy(to + o, &unit, sizeof(unit));
    });
  }

  Factors behind(int64_t outputs) const {
    Factors moved = *this;
    moved.even += outputs, moved.odd += outputs;
    return moved;
  }

  template <int R, int V>
  INLINE void add(
      Sums<R, V, float>& sums, int64_t line, int64_t pixels, const uint32_t* packed, int64_t pitch,
      int64_t across) const {
    const int64_t low = across > 0 ? across : 0, high = across < 0 ? pixels + across : pixels;  // of packed pixels
    const bool apart = across % 2 != 0;
    const int64_t shift = (apart ? across - 1 : across) / 2;  // in units
    const uint32_t* dz = (apart ? odd : even) + (line * units - shift) * stride;
    int64_t u = low / 2;
    if (low % 2) add_units(sums, dz, packed, pitch, u, u + 1, RIGHT), ++u;
    add_units(sums, dz, packed, pitch, u, high / 2, LEFT | RIGHT);
    if (high % 2) add_units(sums, dz, packed, pitch, high / 2, high / 2 + 1, LEFT);
  }

  // Of the units [u, end) those halves alone: what lies outside is no product with zero.
  template <int R, int V>
  INLINE void add_units(
      Sums<R, V, float>& sums, const uint32_t* dz, const uint32_t* packed, int64_t pitch, int64_t u, int64_t end,
      uint32_t halves) const {
    for (; u < end; ++u) {
      Vec<uint32_t, W> value[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        std::memcpy(&value[v], packed + u * pitch + v * W, sizeof(value[v]));
        value[v] &= halves;
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const auto factor = Vec<uint32_t, W>{} + (dz[u * stride + r] & halves);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sums.of[r][v] = add_pair<W>(sums.of[r][v], value[v], factor);
      }
    }
  }
};

// One tap's sums of R outputs over the rows [first, last); `packed` starts at the row `from`.
template <int R, int V, class E>
void add_tap(
    const Correlation<E>& call, const Unit<E>* packed, Factors<E> dz, int64_t from, int64_t first, int64_t last,
    int64_t i, int64_t j, typename Wide<E>::type* found, int64_t panel) {
  using A = typename Wide<E>::type;
  constexpr int64_t pitch = V * LANES_OF<A>;
  const int64_t down = i * call.dilation - call.reach(), across = (j - call.kernel.width / 2) * call.dilation;
  const int64_t distance = across < 0 ? -across : across;
  Sums<R, V, A> sums;
  load_sums(sums, found, panel);
  if (call.kernel.taps() == 1) {
    dz.add(sums, 0, (last - first) * call.width, packed, pitch, 0);
  } else if (distance < call.width) {
    const int64_t line = units_of<E>({1, call.width}) * pitch;
    for (int64_t row = first, y = first % call.height; row < last; ++row, y = y + 1 < call.height ? y + 1 : 0) {
      if (y + down < 0 || y + down >= call.height) continue;
      dz.add(sums, row - first, call.width, packed + (row + down - from) * line, pitch, across);
    }
  }
  store_sums(sums, found, panel);
}

// All taps of `outputs` <= R outputs.
template <int R, int V, class E>
void add_taps(
    const Correlation<E>& call, const Unit<E>* packed, Factors<E> dz, int64_t from, int64_t first, int64_t last,
    int64_t outputs, typename Wide<E>::type* found, int64_t panel) {
  if constexpr (R > 0) {
    if (outputs < R) return add_taps<R - 1, V>(call, packed, dz, from, first, last, outputs, found, panel);
    for (int64_t i = 0; i < call.kernel.height; ++i)
      for (int64_t j = 0; j < call.kernel.width; ++j, found += call.outputs * panel)
        add_tap<R, V>(call, packed, dz, from, first, last, i, j, found, panel);
  }
}

// One panel and `outputs` of dz, over the rows [first, last).
template <class E>
void add_panel(
    const Correlation<E>& call, int64_t channel, Factors<E> dz, int64_t outputs, int64_t first, int64_t last,
    Unit<E>* packed, typename Wide<E>::type* sums) {
  constexpr int64_t L = LANES_OF<typename Wide<E>::type>, panel = 2 * L;
  const int64_t left = call.channels - channel, held = left < panel ? left : panel, pitch = held > L ? panel : L;
  const int64_t reach = call.reach(), from = first > reach ? first - reach : 0;
  const int64_t to = last + reach < call.rows ? last + reach : call.rows;
  pack_panel(call, channel, held, pitch, from * call.width, lines_of(call, to - from), packed);
  for (int64_t blocks = (outputs + ROWS - 1) / ROWS; blocks > 0; --blocks) {  // as even as can be
    const int64_t some = (outputs + blocks - 1) / blocks;
    if (pitch == panel) add_taps<ROWS, 2>(call, packed, dz, from, first, last, some, sums, panel);
    else add_taps<ROWS, 1>(call, packed, dz, from, first, last, some, sums, panel);
    outputs -= some, dz = dz.behind(some), sums += some * panel;
  }
}

template <class E>
int64_t panel_room(const Correlation<E>& call) {
  const Lines lines = lines_of(call, call.rows_packed());
  return lines.count * units_of<E>(lines) * 2 * LANES_OF<typename Wide<E>::type>;
}

template <class E>
void accumulate_panels(
    const Correlation<E>& call, int64_t begin, int64_t end, int64_t first, int64_t last, void* packed,
    typename Wide<E>::type* sums) {
  constexpr int64_t panel = 2 * LANES_OF<typename Wide<E>::type>;
  const int64_t step = call.rows_together(), size = call.kernel.taps() * call.outputs * panel;
  Unit<E>*panels = static_cast<Unit<E>*>(packed), *factors = panels + panel_room(call);
  std::memset(sums, 0, (end - begin) * size * sizeof(*sums));
  for (int64_t o = 0, groups = (call.outputs + OUTPUTS - 1) / OUTPUTS; groups > 0; --groups) {
    const int64_t stop = o + (call.outputs - o + groups - 1) / groups;
    for (int64_t row = first; row < last; row += step) {
      const int64_t below = row + step < last ? row + step : last;
      const Factors<E> dz(call, row, below, o, stop, factors);
      for (int64_t k = begin; k < end; ++k)
        add_panel(call, k * panel, dz, stop - o, row, below, panels, sums + (k - begin) * size + o * panel);
    }
    o = stop;
  }
}

template <class E>
int64_t room(const Correlation<E>& call) {
  return (panel_room(call) + Factors<E>::room(call)) * sizeof(Unit<E>);
}

template <class E>
constexpr WeightGradient<E> weight_gradients() {
  return {2 * LANES_OF<typename Wide<E>::type>, room<E>, accumulate_panels<E>};
}

}  // namespace

extern const WeightGradients WEIGHT_GRADIENTS = {
    weight_gradients<float>(), weight_gradients<double>(), weight_gradients<bfloat16>()};

}  // namespace thresholdnet
