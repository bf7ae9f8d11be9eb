// The plain types that the loops of every device share: elements, rows of channels, activations. No torch, no CUDA.
//
// A row is a pixel: its channels lie side by side, the next row starts `stride` elements later. E is the element type,
// A the type that carries arithmetic and vectors per channel: float, or double for double.
#pragma once
#include <cstdint>

namespace thresholdnet {

struct bfloat16 {  // storage alone: devices widen and round it in their own ways
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class E>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

template <class E>
struct Rows {  // data may be null: none
  E* data = nullptr;
  int64_t stride = 0;
};

template <class A>
struct Range {  // an activation: what lies below `low` is multiplied by `slope`, what lies above `high` becomes that;
  A low, high, slope;  // gradients pass strictly inside, and times `slope` elsewhere
};

template <class A>
struct Norm {  // vectors per channel
  const A *scale, *shift, *mean, *rstd;
};

template <class E>
struct Part {  // one tensor of a list
  using A = typename Wide<E>::type;
  int64_t channels;
  Rows<const E> in, before;
  Rows<E> out;
  const A *scale, *shift;  // null: none
};

struct Pool {  // a window; x is [., height, width, channels] without gaps
  int64_t height, width, channels, out_height, out_width, kernel, stride, padding;
};

}  // namespace thresholdnet
