// The loops of few_pixels.h. Included behind rows.inl, with CONVOLUTIONS defined.
#include <type_traits>

#include "few_pixels.h"

namespace thresholdnet {
namespace {

constexpr int SHARING = 4;                    // outputs, and
constexpr int BESIDE = VECTOR == 64 ? 4 : 2;  // pixels at once: as many sums as there are registers for

// Sums of inner products of O outputs' weights and P pixels.
template <class A, int O, int P>
struct InnerProducts {
  static constexpr int W = VECTOR / sizeof(A);
  typedef typename std::conditional<sizeof(A) == 8, int64_t, int32_t>::type Index;
  Vec<A, W> sums[O][P] = {};

  // Outputs and pixels lie so many elements apart.
  INLINE void add(const A* weight, int64_t output, const A* x, int64_t pixel, int64_t length) {
    int64_t c = 0;
    for (; c + W <= length; c += W) add_vectors(weight + c, output, x + c, pixel, [](auto v) { return v; });
    if (c == length) return;
    if (length >= W) {  // the last W elements, without those that have been added: infinity times zero is NaN
      Vec<Index, W> lane;
      for (int i = 0; i < W; ++i) lane[i] = i;
      const auto late = lane >= Vec<Index, W>{} + static_cast<Index>(W - (length - c));
      c = length - W;
      add_vectors(weight + c, output, x + c, pixel, [&](auto v) { return late ? v : Vec<A, W>{}; });
    } else {
      for (; c < length; ++c)
        for (int o = 0; o < O; ++o)
          for (int p = 0; p < P; ++p) sums[o][p][0] += weight[o * output + c] * x[p * pixel + c];
    }
  }

  template <class F>
  INLINE void add_vectors(const A* weight, int64_t output, const A* x, int64_t pixel, const F& taken) {
    Vec<A, W> value[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) value[p] = taken(load<W>(x + p * pixel));
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) {
      const auto factor = taken(load<W>(weight + o * output));
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sums[o][p] += factor * value[p];
    }
  }

  INLINE A sum(int o, int p) const {
    A total = 0;
    for (int i = 0; i < W; ++i) total += sums[o][p][i];
    return total;
  }
};

// O outputs from `o` on, of P pixels from `p` on that meet the same taps: in every row those from `left` to `right`.
template <int O, int P, class A>
INLINE void convolve_at(
    const FewPixels<A>& call, const A* gathered, A* out, int64_t o, int64_t p, int64_t left, int64_t right) {
  const int64_t above = call.kernel.height / 2, before = call.kernel.width / 2;
  const int64_t output = call.kernel.taps() * call.channels;
  const int64_t y = p / call.width % call.height;
  InnerProducts<A, O, P> products;
  for (int64_t i = 0; i < call.kernel.height; ++i) {
    const int64_t row = y + i - above;
    if (row < 0 || row >= call.height) continue;
    const A* weight = call.weight + o * output + (i * call.kernel.width + left) * call.channels;
    const A* x = gathered + (p + (i - above) * call.width + left - before) * call.channels;
    products.add(weight, output, x, call.channels, (right - left) * call.channels);
  }
  for (int k = 0; k < O; ++k) {
    for (int j = 0; j < P; ++j) {
      const A value = products.sum(k, j);
      out[(p + j) * call.outputs + o + k] = call.bias ? clamp(value + call.bias[o + k], call.act) : value;
    }
  }
}

// The same of `count` pixels.
template <int O, class A>
INLINE void convolve_beside(
    const FewPixels<A>& call, const A* gathered, A* out, int64_t o, int64_t p, int64_t count, int64_t left,
    int64_t right) {
  const int64_t end = p + count;
  for (; p + BESIDE <= end; p += BESIDE) convolve_at<O, BESIDE>(call, gathered, out, o, p, left, right);
  for (; p + 2 <= end; p += 2) convolve_at<O, 2>(call, gathered, out, o, p, left, right);
  for (; p < end; ++p) convolve_at<O, 1>(call, gathered, out, o, p, left, right);
}

template <int O, class A>
void convolve_some(const FewPixels<A>& call, const A* gathered, A* out, int64_t o) {
  const int64_t kernel = call.kernel.width, reach = kernel / 2, width = call.width;
  if (call.kernel.taps() == 1) return convolve_beside<O>(call, gathered, out, o, 0, call.rows(), 0, 1);
  for (int64_t row = 0; row < call.rows(); row += width) {
    for (int64_t x = 0; x < width;) {
      const int64_t left = x < reach ? reach - x : 0, right = x + reach < width ? kernel : width + reach - x;
      const int64_t count = left == 0 && right == kernel ? width - reach - x : 1;
      convolve_beside<O>(call, gathered, out, o, row + x, count, left, right);
      x += count;
    }
  }
}

template <class A>
void convolve(const FewPixels<A>& call, const A* gathered, A* out, int64_t first, int64_t last) {
  int64_t o = first;
  for (; o + SHARING <= last; o += SHARING) convolve_some<SHARING>(call, gathered, out, o);
  for (; o < last; ++o) convolve_some<1>(call, gathered, out, o);
}

template <class A>
void gather_few(const FewPixels<A>& call, A* gathered) {
  gather<A>(call.parts, call.count, call.act, {gathered, call.channels}, 0, call.rows());
}

template <class A>
constexpr Convolution<A> convolution() {
  return {gather_few<A>, convolve<A>};
}

}  // namespace

extern const Convolutions CONVOLUTIONS = {convolution<float>(), convolution<double>()};

}  // namespace thresholdnet
