// The CPU's loops behind the operators of ../ops.cpp: threads, and sums merged in a fixed order.
//
// Rows are cut into chunks of CHUNK, whatever the number of threads; every chunk leaves a partial sum, and partial sums
// are merged in the order of their chunks. Threads are torch's own (torch.set_num_threads).
#define TORCH_TARGET_VERSION 0x020a000000000000  // as in ops.cpp
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../operators.h"
#include "choose.h"
#include "rows.h"

namespace thresholdnet {
namespace {

constexpr int64_t CHUNK = 128;    // rows a partial sum
constexpr int64_t GRAIN = 32768;  // elements that are worth a thread
constexpr int64_t BAND = 8;       // rows of an image that a thread pools at once

const Table& table() {
#if defined(__x86_64__)
  static const Table& found = chosen(baseline_table, avx2_table, avx512_table, avx512_bf16_table);
  return found;
#else
  return baseline_table;
#endif
}

template <class E>
const Kernels<E>& kernels();
template <>
const Kernels<float>& kernels() { return table().f32; }
template <>
const Kernels<double>& kernels() { return table().f64; }
template <>
const Kernels<bfloat16>& kernels() { return table().bf16; }

float widened(float value) { return value; }
double widened(double value) { return value; }
float widened(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

int64_t chunks_of(int64_t rows) { return (rows + CHUNK - 1) / CHUNK; }

template <class F>
void for_chunks(int64_t rows, int64_t channels, const F& f) {
  const int64_t grain = std::max<int64_t>(1, GRAIN / (CHUNK * std::max<int64_t>(1, channels)));
  torch::stable::parallel_for(0, chunks_of(rows), grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) f(k, k * CHUNK, std::min(rows, (k + 1) * CHUNK));
  });
}

// Calls f(image, first, last) for every band of an image's rows.
template <class F>
void for_bands(int64_t images, int64_t rows, const F& f) {
  const int64_t bands = (rows + BAND - 1) / BAND;
  torch::stable::parallel_for(0, images * bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = k % bands * BAND;
      f(k / bands, first, std::min(rows, first + BAND));
    }
  });
}

// Partial sums [chunks, 2, channels] -> [2, channels].
template <class A>
void add_up(const A* partial, int64_t chunks, int64_t channels, A* sums) {
  std::vector<double> total(2 * channels);
  for (int64_t k = 0; k < chunks; ++k)
    for (int64_t c = 0; c < 2 * channels; ++c) total[c] += partial[k * 2 * channels + c];
  for (int64_t c = 0; c < 2 * channels; ++c) sums[c] = static_cast<A>(total[c]);
}

struct Cpu {
  static constexpr bool HALF = false;

  Cpu(const char*, const Tensor&) {}

  template <class E, class A>
  void gather(const std::vector<Part<E>>& parts, int64_t channels, Range<A> act, Rows<E> out, int64_t rows) const {
    for_chunks(rows, channels, [&](int64_t, int64_t first, int64_t last) {
      kernels<E>().gather(parts.data(), parts.size(), act, out, first, last);
    });
  }

  template <class E, class A>
  void moments(Rows<const E> z, int64_t channels, int64_t rows, A* found) const {
    const int64_t chunks = chunks_of(rows);
    const std::unique_ptr<A[]> partial(new A[chunks * 2 * channels]);
    for_chunks(rows, channels, [&](int64_t k, int64_t first, int64_t last) {
      kernels<E>().moments(z, channels, partial.get() + k * 2 * channels, first, last);
    });
    std::vector<double> mean(channels), square(channels);
    for (int64_t k = 0; k < chunks; ++k) {  // Chan, Golub, LeVeque: merge of means and squares, chunk after chunk
      const double n = std::min(CHUNK, rows - k * CHUNK), before = k * CHUNK, share = n / (before + n);
      const A *means = partial.get() + k * 2 * channels, *squares = means + channels;
      for (int64_t c = 0; c < channels; ++c) {
        const double d = means[c] - mean[c];
        square[c] += squares[c] + d * d * before * share;
        mean[c] += d * share;
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      found[c] = static_cast<A>(mean[c]);
      found[channels + c] = static_cast<A>(square[c] / rows);
    }
  }

  template <class E, class A>
  void mask_sums(
      Rows<const E> g, Rows<const E> add, Rows<const E> z, int64_t channels, Norm<A> norm, Range<A> act, Rows<E> out,
      int64_t rows, A* sums) const {
    const std::unique_ptr<A[]> partial(new A[chunks_of(rows) * 2 * channels]);
    for_chunks(rows, channels, [&](int64_t k, int64_t first, int64_t last) {
      kernels<E>().mask_sums(g, add, z, channels, norm, act, out, partial.get() + k * 2 * channels, first, last);
    });
    add_up(partial.get(), chunks_of(rows), channels, sums);
  }

  template <class E, class A>
  void send(
      Rows<const E> g, const std::vector<Part<E>>& parts, Norm<A> norm, Range<A> act, int64_t total, int64_t rows,
      A* sums) const {
    const std::unique_ptr<A[]> partial(new A[chunks_of(rows) * 2 * total]);
    for_chunks(rows, total, [&](int64_t k, int64_t first, int64_t last) {
      kernels<E>().send(
          g, parts.data(), parts.size(), norm, act, partial.get() + k * 2 * total, total, first, last);
    });
    add_up(partial.get(), chunks_of(rows), total, sums);
  }

  template <class E, class A>
  void linear(
      Rows<const E> g, Rows<const E> z, int64_t channels, const A* a, const A* b, const A* c, const A* mean,
      Rows<E> out, int64_t rows) const {
    for_chunks(rows, channels, [&](int64_t, int64_t first, int64_t last) {
      kernels<E>().linear(g, z, channels, a, b, c, mean, out, first, last);
    });
  }

  template <class E, class A>
  void batch_norm_vectors(
      const E* gamma, const E* beta, const A* mean, const A* variance, A eps, A pixels, int64_t channels,
      A* made) const {
    for (int64_t c = 0; c < channels; ++c) {
      const A g = widened(gamma[c]), b = widened(beta[c]), rstd = 1 / std::sqrt(variance[c] + eps), scale = g * rstd;
      const A row[] = {g, b, scale, b - mean[c] * scale, rstd, -scale / pixels, -scale / pixels * rstd};
      for (int64_t j = 0; j < 7; ++j) made[j * channels + c] = row[j];
    }
  }

  template <class E>
  void max_pool(const E* x, E* out, const Pool& pool, int64_t images) const {
    const int64_t read = pool.height * pool.width * pool.channels;
    const int64_t written = pool.out_height * pool.out_width * pool.channels;
    for_bands(images, pool.out_height, [&](int64_t image, int64_t first, int64_t last) {
      kernels<E>().max_pool(x + image * read, out + image * written, pool, first, last);
    });
  }

  template <class E>
  void max_pool_backward(const E* grad, const E* x, E* out, const Pool& pool, int64_t images) const {
    const int64_t size = pool.height * pool.width * pool.channels;
    const int64_t pooled = pool.out_height * pool.out_width * pool.channels;
    for_bands(images, pool.height, [&](int64_t image, int64_t first, int64_t last) {
      kernels<E>().max_pool_backward(grad + image * pooled, x + image * size, out + image * size, pool, first, last);
    });
  }
};

std::string instructions() { return table().name; }

}  // namespace
}  // namespace thresholdnet

STABLE_TORCH_LIBRARY_IMPL(thresholdnet_csrc, CPU, m) { thresholdnet::Operators<thresholdnet::Cpu>::implement(m); }

STABLE_TORCH_LIBRARY_IMPL(thresholdnet_csrc, CompositeExplicitAutograd, m) {
  m.impl("instructions", TORCH_BOX(&thresholdnet::instructions));
}
