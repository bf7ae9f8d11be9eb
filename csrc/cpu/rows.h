// Loops over rows of channels, one set per element type and instruction set. No torch here: pointers and strides.
//
// Every function works on the rows [first, last), so results do not depend on how rows are shared among threads.
#pragma once
#include <cstdint>

#include "../types.h"

namespace thresholdnet {

struct Kernel {  // of a convolution, in taps
  int64_t height, width;

  int64_t taps() const { return height * width; }
};

template <class E>
struct Kernels {
  using A = typename Wide<E>::type;
  void (*gather)(const Part<E>* parts, int64_t count, Range<A> act, Rows<E> out, int64_t first, int64_t last);
  // mean and sum of squared differences from it, [2, channels]
  void (*moments)(Rows<const E> z, int64_t channels, A* found, int64_t first, int64_t last);
  // sums: sum(out) and sum(out * xhat), [2, channels]
  void (*mask_sums)(
      Rows<const E> g, Rows<const E> add, Rows<const E> z, int64_t channels, Norm<A> norm, Range<A> act, Rows<E> out,
      A* sums, int64_t first, int64_t last);
  void (*send)(
      Rows<const E> g, const Part<E>* parts, int64_t count, Norm<A> norm, Range<A> act, A* sums, int64_t total,
      int64_t first, int64_t last);
  void (*linear)(
      Rows<const E> g, Rows<const E> z, int64_t channels, const A* a, const A* b, const A* c, const A* mean,
      Rows<E> out, int64_t first, int64_t last);
  // rows [first, last) of one image's output
  void (*max_pool)(const E* x, E* out, Pool pool, int64_t first, int64_t last);
  // rows [first, last) of one image's gradient with respect to the input
  void (*max_pool_backward)(const E* grad, const E* x, E* out, Pool pool, int64_t first, int64_t last);
};

struct Table {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
  Kernels<bfloat16> bf16;
};

extern const Table baseline_table;
#if defined(__x86_64__)
extern const Table avx2_table, avx512_table, avx512_bf16_table;
#endif

}  // namespace thresholdnet
