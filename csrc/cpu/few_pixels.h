// A convolution of few pixels over tensors side by side:
//
//   out[p, o] = sum_{i, j} <w[o, i, j], a[p + (i - h / 2, j - w / 2)]>,   a = act(x * scale + shift)
//
// or, with a bias, act(out + bias).
//
// p: a pixel; h x w: taps; those (i, j) that fall outside the image are left out. Where pixels are few a weight is read
// from memory for hardly more than one multiply-add, so what counts is to read it once, where it lies, and nothing but
// the taps that meet pixels: of a single pixel's nine taps one. A pixel's taps in one row of the image lie side by side
// in the weight as in the row: they are one inner product, and SHARING outputs share what they read of the row.
//
// No torch here. Every output is summed in an order of its own: no result depends on the number of threads.
#pragma once
#include "rows.h"

namespace thresholdnet {

template <class A>
struct FewPixels {  // one call, of float or double
  const Part<A>* parts;
  int64_t count, channels;
  Range<A> act;
  int64_t images, height, width;
  Kernel kernel;
  int64_t outputs;
  const A* weight;  // [outputs, h, w, channels]
  const A* bias;    // null: none, and no activation behind

  int64_t rows() const { return images * height * width; }
};

template <class A>
struct Convolution {
  // a, [rows, channels], into `gathered`
  void (*gather)(const FewPixels<A>& call, A* gathered);
  // the outputs [first, last) of out, [rows, outputs]
  void (*convolve)(const FewPixels<A>& call, const A* gathered, A* out, int64_t first, int64_t last);
};

struct Convolutions {
  Convolution<float> f32;
  Convolution<double> f64;
};

extern const Convolutions baseline_convolutions;
#if defined(__x86_64__)
extern const Convolutions avx2_convolutions, avx512_convolutions;
#endif

}  // namespace thresholdnet
