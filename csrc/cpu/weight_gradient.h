// A convolution's weight gradient over tensors side by side, which are read where they lie:
//
//   dw[o, c, i, j] = sum_p dz[p, o] a[p + (i - h / 2, j - w / 2) d, c],   a = act(x * scale + shift)
//
// p: a pixel; d: the dilation; h x w: taps; those (i, j) that fall outside the image add nothing, not even zeros. It is
// a matrix product per tap, O x C over all pixels, and the h * w of them share what they read. C is cut into panels. Of
// some rows of pixels at once, a panel's channels are packed side by side, activated, where they stay in the first-level
// cache for all taps and outputs, and sums are kept in registers. bfloat16 is packed in pairs of pixels, which
// instructions take at once (weight_gradient.inl).
//
// No torch here. No sum depends on the number of threads: tasks and their order come from the shapes alone.
#pragma once
#include "rows.h"

namespace thresholdnet {

template <class E>
struct Correlation {  // one call; rows are rows of pixels, [images * height] of them
  using A = typename Wide<E>::type;
  static constexpr int64_t TOGETHER = sizeof(E) == 2 ? 512 : 256;  // pixels that are packed at once, about

  const Part<E>* parts;
  int64_t count, channels;
  Range<A> act;
  Rows<const E> dz;
  int64_t outputs;
  Kernel kernel;
  int64_t dilation, rows, height, width;

  int64_t reach() const { return kernel.height / 2 * dilation; }  // of the taps, in rows
  int64_t rows_together() const { return width < TOGETHER ? TOGETHER / width : 1; }
  int64_t rows_packed() const {  // with those above and below
    const int64_t together = rows_together() + 2 * reach();
    return together < rows ? together : rows;
  }
};

template <class E>
struct WeightGradient {
  using A = typename Wide<E>::type;
  int64_t panel;  // channels
  int64_t (*room)(const Correlation<E>& call);  // bytes that `packed` must have
  // sums [panels, taps, outputs, panel] of the panels [begin, end), over the rows [first, last)
  void (*accumulate)(
      const Correlation<E>& call, int64_t begin, int64_t end, int64_t first, int64_t last, void* packed, A* sums);
};

struct WeightGradients {
  WeightGradient<float> f32;
  WeightGradient<double> f64;
  WeightGradient<bfloat16> bf16;
};

extern const WeightGradients baseline_weight_gradients;
#if defined(__x86_64__)
extern const WeightGradients avx2_weight_gradients, avx512_weight_gradients, avx512_bf16_weight_gradients;
#endif

}  // namespace thresholdnet
