// A convolution's weight gradient over tensors side by side, which are read where they lie:
//
//   dw[o, c, i, j] = sum_p dz[p, o] a[p + (i - r, j - r) d, c],   a = act(x * scale + shift),  r = k / 2
//
// p: a pixel; d: the dilation; taps (i, j) that fall outside the image add nothing, not even zeros. It is a matrix
// product per tap, O x C over all pixels, and the k * k of them share what they read. C is cut into panels. Of some rows
// of pixels at once, a panel's channels are packed side by side, activated, where they stay in the first-level cache for
// all taps and outputs, and sums are kept in registers.
//
// No torch here. No sum depends on the number of threads: tasks and their order come from the shapes alone.
#pragma once
#include "rows.h"

namespace thresholdnet {

template <class A>
struct Correlation {  // one call, of float or double; rows are rows of pixels, [images * height] of them
  static constexpr int64_t TOGETHER = 256;  // pixels that are packed at once, about

  const Part<A>* parts;
  int64_t count, channels;
  Range<A> act;
  Rows<const A> dz;
  int64_t outputs, kernel, dilation, rows, height, width;

  int64_t taps() const { return kernel * kernel; }
  int64_t reach() const { return kernel / 2 * dilation; }  // of the taps, in pixels
  int64_t rows_together() const { return width < TOGETHER ? TOGETHER / width : 1; }
  int64_t pixels_packed() const {  // with the rows above and below
    const int64_t together = rows_together() + 2 * reach();
    return (together < rows ? together : rows) * width;
  }
};

template <class A>
struct WeightGradient {
  int64_t panel;  // channels
  // sums [panels, taps, outputs, panel] of the panels [begin, end), over the rows [first, last); `packed` has room for
  // pixels_packed() x panel
  void (*accumulate)(
      const Correlation<A>& call, int64_t begin, int64_t end, int64_t first, int64_t last, A* packed, A* sums);
};

struct WeightGradients {
  WeightGradient<float> f32;
  WeightGradient<double> f64;
};

extern const WeightGradients baseline_weight_gradients;
#if defined(__x86_64__)
extern const WeightGradients avx2_weight_gradients, avx512_weight_gradients;
#endif

}  // namespace thresholdnet
