// Passes that write one value per value read, without sums:
//
//   gather   out = act(x * scale + shift), or x, tensors side by side
//   linear   out = a * g + b * (x - mean) + c
//
// A thread loads several rows before it stores the first, so that enough bytes are on their way. out may be g.
#include "passes_pieces.cuh"

namespace thresholdnet::pixels {
namespace {

template <class E>
__global__ void __launch_bounds__(THREADS, 1) copy_kernel(const Pieces<E> pieces) {
  constexpr int ROWS = 4;
  const Piece<E>& piece = pieces.at[blockIdx.x % pieces.count];
  const Share share = share_of(pieces, piece);
  by_width<E>(piece.width, [&](auto width) {
    constexpr int W = decltype(width)::value;
    const E* from = piece.x.data + share.column * W;
    E* to = piece.out.data + share.column * W;
    for (int64_t r = share.first; r < share.last; r += ROWS * share.lanes) {
      Pack<E, W> x[ROWS];
#pragma unroll
      for (int u = 0; u < ROWS; ++u) {
        const int64_t row = r + u * share.lanes;
        if (row < share.last) x[u] = load_pack<W>(from + row * piece.x.stride);
      }
#pragma unroll
      for (int u = 0; u < ROWS; ++u) {
        const int64_t row = r + u * share.lanes;
        if (row < share.last) store_pack(to + row * piece.out.stride, x[u]);
      }
    }
  });
}

template <class E>
__global__ void __launch_bounds__(THREADS, 1) affine_kernel(
    const Pieces<E> pieces, Vector<E> __restrict__ scale, Vector<E> __restrict__ shift, const Activation<E> act) {
  using A = typename Wide<E>::type;
  constexpr int ROWS = 4;
  const Piece<E>& piece = pieces.at[blockIdx.x % pieces.count];
  const Share share = share_of(pieces, piece);
  by_width<E>(piece.width, [&](auto width) {
    constexpr int W = decltype(width)::value;
    const E* from = piece.x.data + share.column * W;
    E* to = piece.out.data + share.column * W;
    A factor[W], constant[W];
    load_vector(factor, scale, piece.channel + share.column * W);
    load_vector(constant, shift, piece.channel + share.column * W);
    for (int64_t r = share.first; r < share.last; r += ROWS * share.lanes) {
      Pack<E, W> x[ROWS];
#pragma unroll
      for (int u = 0; u < ROWS; ++u) {
        const int64_t row = r + u * share.lanes;
        if (row < share.last) x[u] = load_pack<W>(from + row * piece.x.stride);
      }
#pragma unroll
      for (int u = 0; u < ROWS; ++u) {
        const int64_t row = r + u * share.lanes;
        if (row >= share.last) break;
#pragma unroll
        for (int i = 0; i < W; ++i) x[u].at[i] = narrow<E>(activate(widen(x[u].at[i]) * factor[i] + constant[i], act));
        store_pack(to + row * piece.out.stride, x[u]);
      }
    }
  });
}

template <class E>
__global__ void __launch_bounds__(THREADS, 1) linear_kernel(
    const Pieces<E> pieces, Vector<E> __restrict__ a, Vector<E> __restrict__ b, Vector<E> __restrict__ c,
    Vector<E> __restrict__ mean) {
  using A = typename Wide<E>::type;
  constexpr int ROWS = 2;
  const Piece<E>& piece = pieces.at[blockIdx.x % pieces.count];
  const Share share = share_of(pieces, piece);
  by_width<E>(piece.width, [&](auto width) {
    constexpr int W = decltype(width)::value;
    const E *raw = piece.x.data + share.column * W, *gradient = piece.g.data + share.column * W;
    E* to = piece.out.data + share.column * W;
    A first[W], second[W], constant[W], center[W];
#pragma unroll
    for (int i = 0; i < W; ++i) {
      first[i] = a ? a[piece.channel + share.column * W + i] : A(1);
      center[i] = mean ? mean[piece.channel + share.column * W + i] : A(0);
    }
    load_vector(second, b, piece.channel + share.column * W);
    load_vector(constant, c, piece.channel + share.column * W);
    for (int64_t r = share.first; r < share.last; r += ROWS * share.lanes) {
      Pack<E, W> x[ROWS], g[ROWS];
#pragma unroll
      for (int u = 0; u < ROWS; ++u) {
        const int64_t row = r + u * share.lanes;
        if (row >= share.last) break;
        x[u] = load_pack<W>(raw + row * piece.x.stride);
        g[u] = load_pack<W>(gradient + row * piece.g.stride);
      }
#pragma unroll
      for (int u = 0; u < ROWS; ++u) {
        const int64_t row = r + u * share.lanes;
        if (row >= share.last) break;
#pragma unroll
        for (int i = 0; i < W; ++i) {
          const A rest = (widen(x[u].at[i]) - center[i]) * second[i] + constant[i];
          g[u].at[i] = narrow<E>(widen(g[u].at[i]) * first[i] + rest);
        }
        store_pack(to + row * piece.out.stride, g[u]);
      }
    }
  });
}

}  // namespace

template <class E>
const char* gather(
    const Part<E>* parts, int64_t count, Vector<E> scale, Vector<E> shift, Activation<E> act, Rows<E> out, int64_t rows,
    void* stream) {
  std::vector<Piece<E>> list;
  int64_t channel = 0;
  for (int64_t j = 0; j < count; ++j) {
    Piece<E> piece{};
    piece.x = parts[j].in;
    piece.out = {out.data + channel, out.stride};
    piece.channel = static_cast<int>(channel);
    append(list, piece, parts[j].channels);
    channel += parts[j].channels;
  }
  if (!scale) return launch_pieces(copy_kernel<E>, list, rows, stream);
  return launch_pieces(affine_kernel<E>, list, rows, stream, scale, shift, act);
}

template <class E>
const char* linear(
    Rows<const E> g, Rows<const E> z, int64_t channels, Vector<E> a, Vector<E> b, Vector<E> c, Vector<E> mean,
    Rows<E> out, int64_t rows, void* stream) {
  std::vector<Piece<E>> list;
  Piece<E> piece{};
  piece.x = z;
  piece.g = g;
  piece.out = out;
  append(list, piece, channels);
  return launch_pieces(linear_kernel<E>, list, rows, stream, a, b, c, mean);
}

#define INSTANTIATE(E)                                                                                                \
  template const char* gather<E>(                                                                                     \
      const Part<E>*, int64_t, Vector<E>, Vector<E>, Activation<E>, Rows<E>, int64_t, void*);                         \
  template const char* linear<E>(                                                                                     \
      Rows<const E>, Rows<const E>, int64_t, Vector<E>, Vector<E>, Vector<E>, Vector<E>, Rows<E>, int64_t, void*)
INSTANTIATE(float);
INSTANTIATE(double);
INSTANTIATE(bfloat16);
INSTANTIATE(float16);

}  // namespace thresholdnet::pixels
