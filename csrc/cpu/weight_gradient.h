// A convolution's weight gradient over tensors side by side, which are read where they lie:
//
//   dw[o, c, i, j] = sum_p dz[p, o] a[p + (i - r, j - r), c],   a = act(x * scale + shift),  r = k / 2
//
// p: a pixel; taps (i, j) that fall outside the image add nothing, not even zeros. It is a matrix product per tap, O x C
// over all pixels, and the k * k of them share what they read. C is cut into panels, of which a task takes one: it packs
// its channels of some rows of pixels, activated, side by side, so that they stay in the first-level cache for all taps
// and outputs, and adds up in registers.
//
// No torch here. No sum depends on the number of threads: tasks and their order come from the shapes alone.
#pragma once
#include "rows.h"

namespace thresholdnet {

template <class E>
struct Correlation {  // one call; rows are rows of pixels, [images * height] of them
  const Part<E>* parts;
  int64_t count, channels;
  Range<typename Wide<E>::type> act;
  Rows<const E> dz;
  int64_t outputs, kernel, rows, height, width;

  int64_t taps() const { return kernel * kernel; }
};

template <class E>
struct WeightGradient {
  using A = typename Wide<E>::type;
  int64_t panel;  // channels a task
  // elements that `accumulate` needs
  int64_t (*scratch)(const Correlation<E>& call);
  // sums [panels, taps, outputs, panel] of the panels [begin, end), over the rows [first, last)
  void (*accumulate)(
      const Correlation<E>& call, int64_t begin, int64_t end, int64_t first, int64_t last, A* scratch, A* sums);
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
