// How the pooling passes find their windows and what is largest there. A thread has one place of an image (a pixel, a
// window) and `vector` neighbouring channels of it.
#pragma once
#include <algorithm>
#include <cmath>

#include "passes_pieces.cuh"

namespace thresholdnet::pixels {

struct Window {  // Pool, in 32 bits: one launch has fewer than 2^31 threads
  int height, width, channels, out_height, out_width, kernel, stride, padding;
  int columns, vector;  // columns of `vector` channels
  unsigned threads;     // of the launch
};

struct Span {  // a window clipped to the image, on one axis
  int first, last;
};

__device__ __forceinline__ Span clipped(int at, int size, const Window& w) {
  const int start = at * w.stride - w.padding, end = start + w.kernel;
  return {start < 0 ? 0 : start, end < size ? end : size};
}

// Where a thread is: a column of a place, in images of height x width places.
struct Spot {
  int64_t image;
  int y, x, column;
};

__device__ __forceinline__ Spot spot_of(unsigned thread, int height, int width, int columns) {
  const unsigned pixel = thread / columns, row = pixel / width;
  const int y = static_cast<int>(row % height), x = static_cast<int>(pixel % width);
  return {row / height, y, x, static_cast<int>(thread % columns)};
}

// Lengths of a side in windows side by side (kernel = stride, padding 0), the last of which may reach beyond the image.
__host__ __device__ inline int64_t windows_over(int64_t length, int64_t kernel) {
  return (length + kernel - 1) / kernel;
}

inline bool side_by_side(const Pool& pool) { return pool.kernel == pool.stride && pool.padding == 0; }

// The maximum of a window and its place, y * width + x; x: the image, at the thread's channels.
template <int W, class E, class A>
__device__ __forceinline__ void maximum(
    const E* x, const Window& w, Span rows, Span columns, A (&best)[W], int (&place)[W]) {
  const auto pixel = [&](int y, int at) {
    return load_pack<W>(x + (static_cast<int64_t>(y) * w.width + at) * w.channels);
  };
  const Pack<E, W> first = pixel(rows.first, columns.first);
#pragma unroll
  for (int i = 0; i < W; ++i) {
    best[i] = widen(first.at[i]);
    place[i] = rows.first * w.width + columns.first;
  }
  for (int y = rows.first; y < rows.last; ++y) {
    for (int at = columns.first; at < columns.last; ++at) {
      const Pack<E, W> found = pixel(y, at);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const A value = widen(found.at[i]);
        if (value > best[i] || value != value) {
          best[i] = value;
          place[i] = y * w.width + at;
        }
      }
    }
  }
}

// The same of K x K pixels from (top, left) on, a row being loaded while the one before is looked at. What lies outside
// is read from the nearest pixel inside, at whose place it counts: a copy beside its pixel makes no other one first or
// last. place: row * K + column inside the window.
template <int W, int K, class E, class A>
__device__ __forceinline__ void maximum_of(
    const E* x, const Window& w, int top, int left, A (&best)[W], int (&place)[W]) {
  const auto inside = [](int at, int size) { return at < 0 ? 0 : at < size ? at : size - 1; };
  const int64_t row_size = static_cast<int64_t>(w.width) * w.channels;
  const E* start = x + static_cast<int64_t>(inside(left, w.width)) * w.channels;
  int columns[K];
#pragma unroll
  for (int j = 0; j < K; ++j) columns[j] = (inside(left + j, w.width) - inside(left, w.width)) * w.channels;
  Raw<E, W> found[2][K];
  const auto load_row = [&](int i) {
    const E* row = start + inside(top + i, w.height) * row_size;
#pragma unroll
    for (int j = 0; j < K; ++j) found[i % 2][j] = load_aligned<Raw<E, W>>(row + columns[j]);
  };
  load_row(0);
#pragma unroll
  for (int k = 0; k < W; ++k) {
    best[k] = static_cast<A>(-INFINITY);
    place[k] = (inside(top, w.height) - top) * K + inside(left, w.width) - left;  // where there is nothing larger
  }
#pragma unroll
  for (int i = 0; i < K; ++i) {
    if (i + 1 < K) load_row(i + 1);
    const int row = (inside(top + i, w.height) - top) * K;
#pragma unroll
    for (int j = 0; j < K; ++j) {
      const int here = row + inside(left + j, w.width) - left;
      A value[W];
      widen_all<E>(found[i % 2][j], value);
#pragma unroll
      for (int k = 0; k < W; ++k) {
        if (value[k] > best[k] || value[k] != value[k]) {
          best[k] = value[k];
          place[k] = here;
        }
      }
    }
  }
}

// Launches for as many images at once as 32 bits count threads, which have one of an image's `places` each:
// launch(first image, images, window).
template <class Launch>
const char* for_images(const Pool& pool, int64_t images, int64_t places, int vector, const Launch& launch) {
  const int64_t columns = pool.channels / vector, threads = places * columns;
  if (threads > INT32_MAX || pool.height * pool.width > 1 << 30)
    return "an image has more than 2^30 pixels, or takes more than 2^31 - 1 threads";
  if (threads == 0) return nullptr;
  const auto small = [](int64_t value) { return static_cast<int>(value); };
  Window w{small(pool.height), small(pool.width), small(pool.channels), small(pool.out_height), small(pool.out_width),
           small(pool.kernel), small(pool.stride), small(pool.padding), small(columns), vector, 0};
  const int64_t at_once = INT32_MAX / threads;
  const char* problem = nullptr;
  for (int64_t first = 0; first < images && !problem; first += at_once) {
    const int64_t count = std::min(at_once, images - first);
    w.threads = static_cast<unsigned>(count * threads);
    problem = launch(first, count, w);
  }
  return problem;
}

inline int64_t blocks_for(const Window& w) { return (static_cast<int64_t>(w.threads) + THREADS - 1) / THREADS; }

// Elements of an image, and of the pooled one.
inline int64_t image_size(const Pool& pool) { return pool.height * pool.width * pool.channels; }
inline int64_t pooled_size(const Pool& pool) { return pool.out_height * pool.out_width * pool.channels; }

}  // namespace thresholdnet::pixels
