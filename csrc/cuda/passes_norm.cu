// batch_norm_vectors: a BatchNorm's vectors, a channel a thread. See ../ops.cpp.
#include <cmath>

#include "device.cuh"
#include "passes.h"

namespace thresholdnet::pixels {
namespace {

constexpr int CHANNELS = 128;  // of a block

template <class E>
__global__ void __launch_bounds__(CHANNELS) batch_norm_vectors_kernel(
    const E* gamma, const E* beta, Vector<E> mean, Vector<E> variance, typename Wide<E>::type eps,
    typename Wide<E>::type pixels, int64_t channels, Sums<E> made) {
  using A = typename Wide<E>::type;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * CHANNELS + threadIdx.x;
  if (c >= channels) return;
  const A g = widen(gamma[c]), b = widen(beta[c]), rstd = 1 / sqrt(variance[c] + eps), scale = g * rstd;
  const A row[] = {g, b, scale, b - mean[c] * scale, rstd, -scale / pixels, -scale / pixels * rstd};
#pragma unroll
  for (int j = 0; j < 7; ++j) made[j * channels + c] = row[j];
}

}  // namespace

template <class E>
const char* batch_norm_vectors(
    const E* gamma, const E* beta, Vector<E> mean, Vector<E> variance, typename Wide<E>::type eps,
    typename Wide<E>::type pixels, int64_t channels, Sums<E> made, void* stream) {
  const int64_t blocks = (channels + CHANNELS - 1) / CHANNELS;
  return launch(
      batch_norm_vectors_kernel<E>, blocks, CHANNELS, 0, stream, gamma, beta, mean, variance, eps, pixels, channels,
      made);
}

#define INSTANTIATE(E)                                                                                        \
  template const char* batch_norm_vectors<E>(                                                                 \
      const E*, const E*, Vector<E>, Vector<E>, typename Wide<E>::type, typename Wide<E>::type, int64_t, Sums<E>, \
      void*)
INSTANTIATE(float);
INSTANTIATE(double);
INSTANTIATE(bfloat16);
INSTANTIATE(float16);

}  // namespace thresholdnet::pixels
