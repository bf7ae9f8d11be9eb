// Max-pooling: a thread has one pixel of the result and `width` neighbouring channels.
//
//   out[y, x] = max over the window of x, clipped to the image: the first of equals, the last NaN, as torch has it
#include "passes_windows.cuh"

namespace thresholdnet::pixels {
namespace {

// K: the kernel's size, 0 for any.
template <class E, int K>
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
    if constexpr (K > 0) {
      maximum_of<W, K>(image, w, spot.y * w.stride - w.padding, spot.x * w.stride - w.padding, best, place);
    } else {
      maximum(image, w, clipped(spot.y, w.height, w), clipped(spot.x, w.width, w), best, place);
    }
    store_narrowed(out + static_cast<int64_t>(thread) * W, best);
  });
}

}  // namespace

template <class E>
const char* max_pool(const E* x, E* out, const Pool& pool, int64_t images, void* stream) {
  const Piece<E> piece{{x, pool.channels}, {}, {}, {out, pool.channels}, 0, 0, 0};
  const auto kernel = pool.kernel == 2 ? max_pool_kernel<E, 2>
      : pool.kernel == 3               ? max_pool_kernel<E, 3>
                                       : max_pool_kernel<E, 0>;
  const int vector = width_of(piece, pool.channels);
  return for_images(
      pool, images, pool.out_height * pool.out_width, vector, [&](int64_t first, int64_t, const Window& w) {
        return launch(
            kernel, blocks_for(w), THREADS, 0, stream, x + first * image_size(pool), out + first * pooled_size(pool),
            w);
      });
}

#define INSTANTIATE(E) template const char* max_pool<E>(const E*, E*, const Pool&, int64_t, void*)
INSTANTIATE(float);
INSTANTIATE(double);
INSTANTIATE(bfloat16);
INSTANTIATE(float16);

}  // namespace thresholdnet::pixels
