// Averages of windows side by side (kernel K = stride, no padding); their gradient is passes_sums.cu's.
//
//   out[y, x] = sum of v over the K x K pixels of the window / K^2,  v = z, or act(z * scale + shift)
//
// A window is added up row by row in float or double, and rounded once. A row here is a pixel of the result.
#include "passes_sides.cuh"

namespace thresholdnet::pixels {
namespace {

// SIZE: the kernel's size, 0 for any.
template <class E, int SIZE, bool AFFINE>
__global__ void __launch_bounds__(THREADS, 1) average_kernel(
    const Pieces<E> pieces, const Sides sides, Vector<E> __restrict__ scale, Vector<E> __restrict__ shift,
    const Activation<E> act) {
  using A = typename Wide<E>::type;
  const Piece<E>& piece = pieces.at[blockIdx.x % pieces.count];
  const Share share = share_of(pieces, piece);
  const int size = SIZE > 0 ? SIZE : sides.kernel;
  const A part = A(1) / static_cast<A>(size * size);
  by_width<E>(piece.width, [&](auto width) {
    constexpr int W = decltype(width)::value;
    const E* from = piece.x.data + share.column * W;
    [[maybe_unused]] A factor[W], constant[W];
    if constexpr (AFFINE) {
      load_vector(factor, scale, piece.channel + share.column * W);
      load_vector(constant, shift, piece.channel + share.column * W);
    }
    const auto add = [&](A (&sum)[W], const Raw<E, W>& found) {
      A value[W];
      widen_all<E>(found, value);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        if constexpr (AFFINE) value[i] = activate(value[i] * factor[i] + constant[i], act);
        sum[i] += value[i];
      }
    };
    for (int64_t r = share.first; r < share.last; r += share.lanes) {
      const E* start = from + first_pixel(sides, static_cast<unsigned>(r), size) * piece.x.stride;
      const int64_t down = sides.width * piece.x.stride;
      A sum[W] = {};
      if constexpr (SIZE > 0) {
        Raw<E, W> found[SIZE][SIZE];
#pragma unroll
        for (int i = 0; i < SIZE; ++i) {
#pragma unroll
          for (int j = 0; j < SIZE; ++j)
            found[i][j] = load_aligned<Raw<E, W>>(start + i * down + j * piece.x.stride);
        }
#pragma unroll
        for (int i = 0; i < SIZE; ++i) {
#pragma unroll
          for (int j = 0; j < SIZE; ++j) add(sum, found[i][j]);
        }
      } else {
        for (int i = 0; i < size; ++i) {
          for (int j = 0; j < size; ++j) add(sum, load_aligned<Raw<E, W>>(start + i * down + j * piece.x.stride));
        }
      }
#pragma unroll
      for (int i = 0; i < W; ++i) sum[i] *= part;
      store_narrowed(piece.out.data + share.column * W + r * piece.out.stride, sum);
    }
  });
}

}  // namespace

template <class E>
const char* avg_pool(
    const E* x, Vector<E> scale, Vector<E> shift, Activation<E> act, E* out, const Pool& pool, int64_t images,
    void* stream) {
  const auto kernel = scale ? (pool.kernel == 2 ? average_kernel<E, 2, true> : average_kernel<E, 0, true>)
                            : (pool.kernel == 2 ? average_kernel<E, 2, false> : average_kernel<E, 0, false>);
  if (const char* problem = sides_problem(pool, images)) return problem;
  Piece<E> piece{};
  piece.x = {x, pool.channels};
  piece.out = {out, pool.channels};
  std::vector<Piece<E>> list;
  append(list, piece, pool.channels);
  const int64_t rows = images * pool.out_height * pool.out_width;
  return launch_pieces(kernel, list, rows, stream, sides_of(pool), scale, shift, act);
}

#define INSTANTIATE(E)               \
  template const char* avg_pool<E>( \
      const E*, Vector<E>, Vector<E>, Activation<E>, E*, const Pool&, int64_t, void*)
INSTANTIATE(float);
INSTANTIATE(double);
INSTANTIATE(bfloat16);
INSTANTIATE(float16);

}  // namespace thresholdnet::pixels
