// Max-pooling and its gradient: a thread has one pixel of the result and `width` neighbouring channels.
//
//   out[y, x]  = max over the window of x, clipped to the image: the first of equals, the last NaN, as torch has it
//   dx[y, x]   = sum of grad[v, u] over the windows (v, u) whose maximum lies at (y, x)
//
// Backward finds the maxima again, from x, instead of keeping their places; it gathers, so a pixel is written once and
// its windows are added in a fixed order.
#include <algorithm>

#include "passes_pieces.cuh"

namespace thresholdnet::pixels {
namespace {

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

// Windows that hold a pixel, on one axis.
__device__ __forceinline__ Span windows_at(int pixel, int out_size, const Window& w) {
  const int reach = pixel + w.padding - w.kernel + 1, last = (pixel + w.padding) / w.stride + 1;
  return {reach <= 0 ? 0 : (reach + w.stride - 1) / w.stride, last < out_size ? last : out_size};
}

// Where a thread is: a column of a pixel, in images of height x width.
struct Spot {
  int64_t image;
  int y, x, column;
};

__device__ __forceinline__ Spot spot_of(unsigned thread, int height, int width, int columns) {
  const unsigned pixel = thread / columns, row = pixel / width;
  const int y = static_cast<int>(row % height), x = static_cast<int>(pixel % width);
  return {row / height, y, x, static_cast<int>(thread % columns)};
}

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

template <class E>
__global__ void __launch_bounds__(THREADS, 1) max_pool_kernel(
    const E* __restrict__ x, E* __restrict__ out, const Window w) {
  using A = typename Wide<E>::type;
  const unsigned thread = blockIdx.x * THREADS + threadIdx.x;
  if (thread >= w.threads) return;
  const Spot spot = spot_of(thread, w.out_height, w.out_width, w.columns);
  by_width<E>(w.vector, [&](auto width) {
    constexpr int W = decltype(width)::value;
    const E* image = x + spot.image * w.height * w.width * w.channels + spot.column * W;
    A best[W];
    int place[W];
    maximum(image, w, clipped(spot.y, w.height, w), clipped(spot.x, w.width, w), best, place);
    Pack<E, W> made;
#pragma unroll
    for (int i = 0; i < W; ++i) made.at[i] = narrow<E>(best[i]);
    store_pack(out + static_cast<int64_t>(thread) * W, made);
  });
}

template <class E>
__global__ void __launch_bounds__(THREADS, 1) max_pool_backward_kernel(
    const E* __restrict__ grad, const E* __restrict__ x, E* __restrict__ out, const Window w) {
  using A = typename Wide<E>::type;
  const unsigned thread = blockIdx.x * THREADS + threadIdx.x;
  if (thread >= w.threads) return;
  const Spot spot = spot_of(thread, w.height, w.width, w.columns);
  by_width<E>(w.vector, [&](auto width) {
    constexpr int W = decltype(width)::value;
    const E* image = x + spot.image * w.height * w.width * w.channels + spot.column * W;
    const E* arriving = grad + spot.image * w.out_height * w.out_width * w.channels + spot.column * W;
    const Span rows = windows_at(spot.y, w.out_height, w), columns = windows_at(spot.x, w.out_width, w);
    A sum[W] = {};
    for (int v = rows.first; v < rows.last; ++v) {
      for (int u = columns.first; u < columns.last; ++u) {
        A best[W];
        int place[W];
        maximum(image, w, clipped(v, w.height, w), clipped(u, w.width, w), best, place);
        const Pack<E, W> g = load_pack<W>(arriving + (static_cast<int64_t>(v) * w.out_width + u) * w.channels);
#pragma unroll
        for (int i = 0; i < W; ++i) sum[i] += place[i] == spot.y * w.width + spot.x ? widen(g.at[i]) : A(0);
      }
    }
    Pack<E, W> made;
#pragma unroll
    for (int i = 0; i < W; ++i) made.at[i] = narrow<E>(sum[i]);
    store_pack(out + static_cast<int64_t>(thread) * W, made);
  });
}

// Launches for as many images at once as 32 bits count threads: launch(first image, window).
template <class Launch>
const char* for_images(const Pool& pool, int64_t images, int64_t pixels, int vector, const Launch& launch) {
  const int64_t columns = pool.channels / vector, threads = pixels * columns;
  if (threads > INT32_MAX || pool.height * pool.width > 1 << 30)
    return "an image has more than 2^30 pixels, or takes more than 2^31 - 1 threads";
  if (threads == 0) return nullptr;
  const auto small = [](int64_t value) { return static_cast<int>(value); };
  Window w{small(pool.height), small(pool.width), small(pool.channels), small(pool.out_height), small(pool.out_width),
           small(pool.kernel), small(pool.stride), small(pool.padding), small(columns), vector, 0};
  const int64_t at_once = INT32_MAX / threads;
  const char* problem = nullptr;
  for (int64_t first = 0; first < images && !problem; first += at_once) {
    w.threads = static_cast<unsigned>(std::min(at_once, images - first) * threads);
    problem = launch(first, w);
  }
  return problem;
}

int64_t blocks_for(const Window& w) { return (static_cast<int64_t>(w.threads) + THREADS - 1) / THREADS; }

}  // namespace

template <class E>
const char* max_pool(const E* x, E* out, const Pool& pool, int64_t images, void* stream) {
  const Piece<E> piece{{x, pool.channels}, {}, {}, {out, pool.channels}, 0, 0, 0};
  const int64_t size = pool.height * pool.width * pool.channels;
  const int64_t made = pool.out_height * pool.out_width * pool.channels;
  const int vector = width_of(piece, pool.channels);
  return for_images(pool, images, pool.out_height * pool.out_width, vector, [&](int64_t first, const Window& w) {
    return launch(max_pool_kernel<E>, blocks_for(w), THREADS, 0, stream, x + first * size, out + first * made, w);
  });
}

template <class E>
const char* max_pool_backward(const E* grad, const E* x, E* out, const Pool& pool, int64_t images, void* stream) {
  const Piece<E> piece{{x, pool.channels}, {grad, pool.channels}, {}, {out, pool.channels}, 0, 0, 0};
  const int64_t size = pool.height * pool.width * pool.channels;
  const int64_t made = pool.out_height * pool.out_width * pool.channels;
  const int vector = width_of(piece, pool.channels);
  return for_images(pool, images, pool.height * pool.width, vector, [&](int64_t first, const Window& w) {
    return launch(
        max_pool_backward_kernel<E>, blocks_for(w), THREADS, 0, stream, grad + first * made, x + first * size,
        out + first * size, w);
  });
}

#define INSTANTIATE(E)                                                               \
  template const char* max_pool<E>(const E*, E*, const Pool&, int64_t, void*);       \
  template const char* max_pool_backward<E>(const E*, const E*, E*, const Pool&, int64_t, void*)
INSTANTIATE(float);
INSTANTIATE(double);
INSTANTIATE(bfloat16);
INSTANTIATE(float16);

}  // namespace thresholdnet::pixels
