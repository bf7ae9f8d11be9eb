// The gradient of max-pooling.
//
//   dx[y, x] = sum of grad[v, u] over the windows (v, u) whose maximum lies at (y, x)
//
// The maxima are found again, from x, instead of keeping their places. Everything gathers: a pixel is written once, by
// one thread, and its windows are added in their order. Three kernels, with equal results:
//
//   tiled         3 x 3 windows in steps of 2: a block finds the maxima of its windows once, as bytes in shared memory
//   side by side  2 x 2 windows in steps of 2: a thread reads a window and writes all of its pixels
//   any           a thread has one pixel, and finds the maximum of every window that holds it
#include "passes_windows.cuh"

namespace thresholdnet::pixels {
namespace {

constexpr int DOWN = 8, ACROSS = 7;  // patches of 2 x 2 pixels of a block's tile: 56 is a multiple of both
constexpr int WINDOWS_DOWN = DOWN + 1, WINDOWS_ACROSS = ACROSS + 1;  // that such a tile meets
constexpr int LANES = 8;                                             // columns of a tile
constexpr int TILE_THREADS = 128;  // kept few: the registers of 5 blocks fit on a multiprocessor

// Places of W maxima as bytes, read in words where there are four.
template <int W>
using Bytes = std::conditional_t<W % 4 == 0, Pack<uint32_t, (W + 3) / 4>, Pack<uint8_t, W>>;

template <int W>
__device__ __forceinline__ bool lies_at(const Bytes<W>& places, int i, unsigned here) {
  if constexpr (W % 4 == 0) {
    return ((places.at[i / 4] ^ here * 0x01010101u) & 0xffu << i % 4 * 8) == 0;
  } else {
    return places.at[i] == here;
  }
}

// Patch (a, b) holds pixels (2a, 2b) to (2a + 1, 2b + 1). Window v has rows 2v - 1 to 2v + 1: rows 2a and 2a + 1 are
// rows 1 and 2 of window a, row 2a + 1 is also row 0 of window a + 1.
template <class E>
__global__ void __launch_bounds__(TILE_THREADS, 1) tiled_backward_kernel(
    const E* __restrict__ grad, const E* __restrict__ x, E* __restrict__ out, const Window w, int down, int across,
    int groups) {
  using A = typename Wide<E>::type;
  using Places = Pack<uint8_t, FULL_WIDTH<E>>;
  constexpr int NOWHERE = 255;  // the maximum of a window that there is not
  SHARED_ARRAY(Places, places, [WINDOWS_DOWN * WINDOWS_ACROSS * LANES]);
  const unsigned tile = blockIdx.x / groups, row = tile / across;
  const int first_v = static_cast<int>(row % down) * DOWN, first_u = static_cast<int>(tile % across) * ACROSS;
  const int64_t image = row / down;
  const int lane = threadIdx.x % LANES, column = static_cast<int>(blockIdx.x % groups) * LANES + lane;
  by_width<E>(w.vector, [&](auto width) {
    constexpr int W = decltype(width)::value;
    const E* from = x + image * w.height * w.width * w.channels + column * W;
    const E* arriving = grad + image * w.out_height * w.out_width * w.channels + column * W;
    E* to = out + image * w.height * w.width * w.channels + column * W;
    const bool has_column = column < w.columns;

#pragma unroll 1
    for (int at = threadIdx.x / LANES; at < WINDOWS_DOWN * WINDOWS_ACROSS; at += TILE_THREADS / LANES) {
      const int v = first_v + at / WINDOWS_ACROSS, u = first_u + at % WINDOWS_ACROSS;
      Pack<uint8_t, W> made;
#pragma unroll
      for (int i = 0; i < W; ++i) made.at[i] = NOWHERE;
      if (has_column && v < w.out_height && u < w.out_width) {
        A best[W];
        int place[W];
        maximum_of<W, 3>(from, w, 2 * v - 1, 2 * u - 1, best, place);
#pragma unroll
        for (int i = 0; i < W; ++i) made.at[i] = static_cast<uint8_t>(place[i]);
      }
      store_pack(places[at * LANES + lane].at, made);
    }
    __syncthreads();

#pragma unroll 1
    for (int at = threadIdx.x / LANES; at < DOWN * ACROSS; at += TILE_THREADS / LANES) {
      const int a = at / ACROSS, b = at % ACROSS, y = 2 * (first_v + a), left = 2 * (first_u + b);
      if (!has_column || y >= w.height || left >= w.width) continue;
      A g[2][2][W];
      Bytes<W> place[2][2];
#pragma unroll
      for (int p = 0; p < 2; ++p) {
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          const int v = first_v + a + p, u = first_u + b + q;
          Raw<E, W> found{};
          if (v < w.out_height && u < w.out_width) {
            const int64_t window = static_cast<int64_t>(v) * w.out_width + u;
            found = load_aligned<Raw<E, W>>(arriving + window * w.channels);
          }
          widen_all<E>(found, g[p][q]);
          place[p][q] = load_aligned<Bytes<W>>(places[((a + p) * WINDOWS_ACROSS + b + q) * LANES + lane].at);
        }
      }
#pragma unroll
      for (int dy = 0; dy < 2; ++dy) {
#pragma unroll
        for (int dx = 0; dx < 2; ++dx) {
          A sum[W] = {};
#pragma unroll
          for (int p = 0; p <= dy; ++p) {
#pragma unroll
            for (int q = 0; q <= dx; ++q) {
              const unsigned here = (p ? 0 : dy + 1) * 3 + (q ? 0 : dx + 1);  // inside the window
#pragma unroll
              for (int i = 0; i < W; ++i) sum[i] += lies_at<W>(place[p][q], i, here) ? g[p][q][i] : A(0);
            }
          }
          if (y + dy >= w.height || left + dx >= w.width) continue;
          store_narrowed(to + (static_cast<int64_t>(y + dy) * w.width + left + dx) * w.channels, sum);
        }
      }
    }
  });
}

template <class E>
__global__ void __launch_bounds__(THREADS, 1) side_by_side_backward_kernel(
    const E* __restrict__ grad, const E* __restrict__ x, E* __restrict__ out, const Window w) {
  using A = typename Wide<E>::type;
  const unsigned thread = blockIdx.x * THREADS + threadIdx.x;
  if (thread >= w.threads) return;
  const Spot spot = spot_of(
      thread, static_cast<int>(windows_over(w.height, 2)), static_cast<int>(windows_over(w.width, 2)), w.columns);
  by_width<E>(w.vector, [&](auto width) {
    constexpr int W = decltype(width)::value;
    const int64_t start = spot.image * w.height * w.width * w.channels + spot.column * W;
    A best[W], g[W] = {};
    int place[W] = {};
    if (spot.y < w.out_height && spot.x < w.out_width) {  // else pixels at the border that no window holds
      const int64_t window = (spot.image * w.out_height + spot.y) * w.out_width + spot.x;
      widen_all<E>(load_aligned<Raw<E, W>>(grad + window * w.channels + spot.column * W), g);
      maximum_of<W, 2>(x + start, w, 2 * spot.y, 2 * spot.x, best, place);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int y = 2 * spot.y + i, left = 2 * spot.x + j;
        if (y >= w.height || left >= w.width) continue;
        A sum[W];
#pragma unroll
        for (int k = 0; k < W; ++k) sum[k] = A(0) + (place[k] == i * 2 + j ? g[k] : A(0));
        store_narrowed(out + start + (static_cast<int64_t>(y) * w.width + left) * w.channels, sum);
      }
    }
  });
}

// Windows that hold a pixel, on one axis.
__device__ __forceinline__ Span windows_at(int pixel, int out_size, const Window& w) {
  const int reach = pixel + w.padding - w.kernel + 1, last = (pixel + w.padding) / w.stride + 1;
  return {reach <= 0 ? 0 : (reach + w.stride - 1) / w.stride, last < out_size ? last : out_size};
}

template <class E>
__global__ void __launch_bounds__(THREADS, 1) any_backward_kernel(
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
    store_narrowed(out + static_cast<int64_t>(thread) * W, sum);
  });
}

}  // namespace

template <class E>
const char* max_pool_backward(const E* grad, const E* x, E* out, const Pool& pool, int64_t images, void* stream) {
  const Piece<E> piece{{x, pool.channels}, {grad, pool.channels}, {}, {out, pool.channels}, 0, 0, 0};
  const int vector = width_of(piece, pool.channels);
  const int64_t size = image_size(pool), pooled = pooled_size(pool);
  const bool tiled = pool.kernel == 3 && pool.stride == 2 && pool.padding == 1;
  const bool two = pool.kernel == 2 && side_by_side(pool);
  const int64_t places = two ? windows_over(pool.height, 2) * windows_over(pool.width, 2) : pool.height * pool.width;
  return for_images(pool, images, places, vector, [&](int64_t first, int64_t count, const Window& w) {
    const E *arriving = grad + first * pooled, *from = x + first * size;
    E* to = out + first * size;
    if (tiled) {
      const int down = static_cast<int>(windows_over(pool.height, 2 * DOWN));
      const int across = static_cast<int>(windows_over(pool.width, 2 * ACROSS));
      const int groups = static_cast<int>(windows_over(w.columns, LANES));
      return launch(
          tiled_backward_kernel<E>, count * down * across * groups, TILE_THREADS, 0, stream, arriving, from, to, w,
          down, across, groups);
    }
    const auto kernel = two ? side_by_side_backward_kernel<E> : any_backward_kernel<E>;
    return launch(kernel, blocks_for(w), THREADS, 0, stream, arriving, from, to, w);
  });
}

#define INSTANTIATE(E) \
  template const char* max_pool_backward<E>(const E*, const E*, E*, const Pool&, int64_t, void*)
INSTANTIATE(float);
INSTANTIATE(double);
INSTANTIATE(bfloat16);
INSTANTIATE(float16);

}  // namespace thresholdnet::pixels
