// Passes that add up over pixels, in two launches: a tile of rows leaves partial[tile, 2, channels], a second launch
// merges them.
//
//   moments     mean_t and M2_t = sum (z - mean_t)^2 of a tile of n_t rows; merged in two steps, without cancellation:
//               mean = sum n_t mean_t / n,  M2 = sum (M2_t + n_t (mean_t - mean)^2)
//   mask_sums   out = v = g [+ add] times act' at x * scale + shift
//   spread_mask_sums  the same of a g that is the gradient of averages: each of its rows for all pixels of a window
//   send        v = g act', and out = [add +] scale * v
//               all three: sum v and rstd * sum v (x - mean)
//
// A thread sums its rows in registers, a block its threads as a tree in shared memory, the merge in double precision.
// Every order is fixed by the shapes alone, and there are no atomics: two runs are equal bit by bit.
#include "merging.cuh"
#include "passes_sides.cuh"

namespace thresholdnet::pixels {
namespace {

constexpr int EACH = MOST_TILES * MERGED / MERGING_THREADS;  // tiles of a slice, at most

// Two numbers per thread and channel of its column; [i] lies behind [i - 1] of all threads: no bank conflicts.
template <class E>
using Kept = typename Wide<E>::type[2][FULL_WIDTH<E> * THREADS];

// The half of a tree over `lanes` at which it starts.
__device__ __forceinline__ int first_half(int lanes) {
  int half = 1;
  while (2 * half < lanes) half *= 2;
  return half;
}

// Adds a block's sums into those of lane 0.
template <int W, class K>
__device__ __forceinline__ void add_lanes(K& kept, const Share& share, int columns) {
  const int t = threadIdx.x;
  for (int half = first_half(share.lanes); half > 0; half /= 2) {
    __syncthreads();
    if (share.lane >= half || share.lane + half >= share.lanes) continue;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      kept[0][i * THREADS + t] += kept[0][i * THREADS + t + half * columns];
      kept[1][i * THREADS + t] += kept[1][i * THREADS + t + half * columns];
    }
  }
}

// Merges a block's moments into those of lane 0; counts: rows of each thread.
template <int W, class K, class A>
__device__ __forceinline__ void merge_lanes(K& kept, A* counts, const Share& share, int columns) {
  const int t = threadIdx.x;
  for (int half = first_half(share.lanes); half > 0; half /= 2) {
    __syncthreads();
    if (share.lane >= half || share.lane + half >= share.lanes) continue;
    const int other = t + half * columns;
    const A mine = counts[t], more = counts[other];
    if (more == 0) continue;
    const A part = more / (mine + more);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const A d = kept[0][i * THREADS + other] - kept[0][i * THREADS + t];
      kept[0][i * THREADS + t] += d * part;
      kept[1][i * THREADS + t] += kept[1][i * THREADS + other] + d * d * (mine * part);
    }
    counts[t] = mine + more;
  }
}

// Lane 0's numbers to partial[tile, 2, channels]; it has read and written them itself.
template <int W, class K, class A>
__device__ __forceinline__ void leave(const K& kept, const Share& share, A* partial, int64_t channels, int channel) {
  if (share.lane > 0) return;
  A* to = partial + share.tile * 2 * channels + channel + share.column * W;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    to[i] = kept[0][i * THREADS + threadIdx.x];
    to[channels + i] = kept[1][i * THREADS + threadIdx.x];
  }
}

template <class E>
__global__ void __launch_bounds__(THREADS, 1) moments_kernel(
    const Pieces<E> pieces, Sums<E> __restrict__ partial, int64_t channels) {
  using A = typename Wide<E>::type;
  constexpr int ROWS = 4;
  SHARED_ARRAY(Kept<E>, kept, );
  SHARED_ARRAY(A, counts, [THREADS]);
  const Piece<E>& piece = pieces.at[blockIdx.x % pieces.count];
  const Share share = share_of(pieces, piece);
  by_width<E>(piece.width, [&](auto width) {
    constexpr int W = decltype(width)::value;
    const E* from = piece.x.data + share.column * W;
    A mean[W] = {}, square[W] = {}, count = 0;
    for (int64_t r = share.first; r < share.last; r += ROWS * share.lanes) {
      Pack<E, W> x[ROWS];
      int found = 0;
#pragma unroll
      for (int u = 0; u < ROWS; ++u) {
        const int64_t row = r + u * share.lanes;
        if (row >= share.last) break;
        x[u] = load_pack<W>(from + row * piece.x.stride);
        ++found;
      }
      const A more = static_cast<A>(found), inverse = 1 / more, part = more / (count + more);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        A sum = 0, around = 0;
#pragma unroll
        for (int u = 0; u < ROWS; ++u) sum += u < found ? widen(x[u].at[i]) : 0;
        const A middle = sum * inverse;
#pragma unroll
        for (int u = 0; u < ROWS; ++u) {
          const A d = u < found ? widen(x[u].at[i]) - middle : 0;
          around += d * d;
        }
        const A d = middle - mean[i];
        mean[i] += d * part;
        square[i] += around + d * d * (count * part);
      }
      count += more;
    }
    counts[threadIdx.x] = count;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      kept[0][i * THREADS + threadIdx.x] = mean[i];
      kept[1][i * THREADS + threadIdx.x] = square[i];
    }
    merge_lanes<W>(kept, counts, share, piece.columns);
    leave<W>(kept, share, partial, channels, piece.channel);
  });
}

// SEND: `send`, else `mask_sums`. out may be g or add. SPREAD: 0, or the size of the windows whose averages' gradient g
// is, -1 for any.
template <class E, bool SEND, int SPREAD>
__global__ void __launch_bounds__(THREADS, 1) mask_kernel(
    const Pieces<E> pieces, const Vectors<E> norm, const Activation<E> act, Sums<E> __restrict__ partial,
    int64_t channels, const Sides sides) {
  using A = typename Wide<E>::type;
  constexpr int ROWS = 2;
  const int size = SPREAD > 0 ? SPREAD : sides.kernel;
  const A part = A(1) / static_cast<A>(size * size);
  SHARED_ARRAY(Kept<E>, kept, );
  const Piece<E>& piece = pieces.at[blockIdx.x % pieces.count];
  const Share share = share_of(pieces, piece);
  by_width<E>(piece.width, [&](auto width) {
    constexpr int W = decltype(width)::value;
    const int channel = piece.channel + share.column * W;
    const E *raw = piece.x.data + share.column * W, *gradient = piece.g.data + share.column * W;
    const E* also = piece.add.data ? piece.add.data + share.column * W : nullptr;
    E* to = piece.out.data + share.column * W;
    A scale[W], shift[W], mean[W], sum[W] = {}, product[W] = {};
    load_vector(scale, norm.scale, channel);
    load_vector(shift, norm.shift, channel);
    load_vector(mean, norm.mean, channel);
    for (int64_t r = share.first; r < share.last; r += ROWS * share.lanes) {
      Pack<E, W> x[ROWS], g[ROWS], add[ROWS];
#pragma unroll
      for (int u = 0; u < ROWS; ++u) {
        const int64_t row = r + u * share.lanes;
        if (row >= share.last) break;
        x[u] = load_pack<W>(raw + row * piece.x.stride);
        const int64_t from = SPREAD == 0 ? row : window_of(sides, static_cast<unsigned>(row), size);
        g[u] = SPREAD != 0 && from < 0 ? Pack<E, W>{} : load_pack<W>(gradient + from * piece.g.stride);
        if (also) add[u] = load_pack<W>(also + row * piece.add.stride);
      }
#pragma unroll
      for (int u = 0; u < ROWS; ++u) {
        const int64_t row = r + u * share.lanes;
        if (row >= share.last) break;
#pragma unroll
        for (int i = 0; i < W; ++i) {
          const A value = widen(x[u].at[i]), y = value * scale[i] + shift[i];
          const A before = also ? widen(add[u].at[i]) : A(0);
          A v = widen(g[u].at[i]);
          if (SPREAD != 0) v *= part;
          if (!SEND) v += before;
          v = behind_activation(v, y, act);
          sum[i] += v;
          product[i] += v * (value - mean[i]);
          g[u].at[i] = narrow<E>(SEND ? scale[i] * v + before : v);
        }
        store_pack(to + row * piece.out.stride, g[u]);
      }
    }
#pragma unroll
    for (int i = 0; i < W; ++i) {
      kept[0][i * THREADS + threadIdx.x] = sum[i];
      kept[1][i * THREADS + threadIdx.x] = product[i] * norm.rstd[channel + i];
    }
    add_lanes<W>(kept, share, piece.columns);
    leave<W>(kept, share, partial, channels, piece.channel);
  });
}

// partial [tiles, 2, channels] -> found [2, channels]: sums, or (MOMENTS) mean and biased variance of all rows.
template <class A, bool MOMENTS>
__global__ void __launch_bounds__(MERGING_THREADS, 1) merge_kernel(
    const A* __restrict__ partial, int64_t tiles, int64_t channels, int64_t rows, int64_t tile_rows,
    A* __restrict__ found) {
  SHARED_ARRAY(double, shared, [MERGING_WARPS * MERGED]);
  const int slice = threadIdx.x / MERGED;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * MERGED + threadIdx.x % MERGED;
  A first[EACH], second[EACH];
#pragma unroll
  for (int u = 0; u < EACH; ++u) {
    const int64_t t = slice + u * slices();
    const bool there = t < tiles && channel < channels;
    first[u] = there ? partial[t * 2 * channels + channel] : A(0);
    second[u] = there ? partial[(t * 2 + 1) * channels + channel] : A(0);
  }
  const auto count = [&](int u) {
    const int64_t left = rows - (slice + u * slices()) * tile_rows;
    return static_cast<double>(left < 0 ? 0 : left < tile_rows ? left : tile_rows);
  };
  double mean = 0, square = 0;  // or two sums
#pragma unroll
  for (int u = 0; u < EACH; ++u) mean += MOMENTS ? count(u) * first[u] : first[u];
  mean = over_slices(shared, mean);
  if (MOMENTS) mean /= static_cast<double>(rows);
#pragma unroll
  for (int u = 0; u < EACH; ++u) {
    const double away = first[u] - mean;
    square += MOMENTS ? second[u] + count(u) * away * away : second[u];
  }
  square = over_slices(shared, square);
  if (slice > 0 || channel >= channels) return;
  found[channel] = static_cast<A>(mean);
  found[channels + channel] = static_cast<A>(MOMENTS ? square / static_cast<double>(rows) : square);
}

template <bool MOMENTS, class A>
const char* merge(const A* partial, int64_t channels, int64_t rows, A* found, void* stream) {
  if (channels == 0) return nullptr;
  const int64_t blocks = (channels + MERGED - 1) / MERGED;
  return launch(
      merge_kernel<A, MOMENTS>, blocks, merging_threads(tiles(rows), EACH), 0, stream, partial, tiles(rows), channels,
      rows, rows_of_tile(rows), found);
}

}  // namespace

int64_t tiles(int64_t rows) { return (rows + rows_of_tile(rows) - 1) / rows_of_tile(rows); }

template <class E>
const char* moments(Rows<const E> z, int64_t channels, int64_t rows, Sums<E> partial, Sums<E> found, void* stream) {
  std::vector<Piece<E>> list;
  Piece<E> piece{};
  piece.x = z;
  append(list, piece, channels);
  const char* problem = launch_pieces(moments_kernel<E>, list, rows, stream, partial, channels);
  return problem ? problem : merge<true>(partial, channels, rows, found, stream);
}

template <class E>
const char* mask_sums(
    Rows<const E> g, Rows<const E> add, Rows<const E> z, int64_t channels, Vectors<E> norm, Activation<E> act,
    Rows<E> out, int64_t rows, Sums<E> partial, Sums<E> sums, void* stream) {
  std::vector<Piece<E>> list;
  append(list, Piece<E>{z, g, add, out, 0, 0, 0}, channels);
  const char* problem = launch_pieces(mask_kernel<E, false, 0>, list, rows, stream, norm, act, partial, channels, Sides());
  return problem ? problem : merge<false>(partial, channels, rows, sums, stream);
}

template <class E>
const char* spread_mask_sums(
    const E* grad, const E* z, Vectors<E> norm, Activation<E> act, E* out, const Pool& pool, int64_t images,
    Sums<E> partial, Sums<E> sums, void* stream) {
  if (const char* problem = sides_problem(pool, images)) return problem;
  const int64_t rows = images * pool.height * pool.width, channels = pool.channels;
  const auto kernel = pool.kernel == 2 ? mask_kernel<E, false, 2> : mask_kernel<E, false, -1>;
  std::vector<Piece<E>> list;
  append(list, Piece<E>{{z, channels}, {grad, channels}, {}, {out, channels}, 0, 0, 0}, channels);
  const char* problem = launch_pieces(kernel, list, rows, stream, norm, act, partial, channels, sides_of(pool));
  return problem ? problem : merge<false>(partial, channels, rows, sums, stream);
}

template <class E>
const char* send(
    Rows<const E> g, const Part<E>* parts, int64_t count, Vectors<E> norm, Activation<E> act, int64_t total,
    int64_t rows, Sums<E> partial, Sums<E> sums, void* stream) {
  std::vector<Piece<E>> list;
  for (int64_t j = 0, channel = 0; j < count; channel += parts[j++].channels) {
    const Rows<const E> arriving{g.data + channel, g.stride};
    append(
        list, Piece<E>{parts[j].in, arriving, parts[j].before, parts[j].out, static_cast<int>(channel), 0, 0},
        parts[j].channels);
  }
  const char* problem = launch_pieces(mask_kernel<E, true, 0>, list, rows, stream, norm, act, partial, total, Sides());
  return problem ? problem : merge<false>(partial, total, rows, sums, stream);
}

#define INSTANTIATE(E)                                                                                                 \
  template const char* moments<E>(Rows<const E>, int64_t, int64_t, Sums<E>, Sums<E>, void*);                          \
  template const char* mask_sums<E>(                                                                                  \
      Rows<const E>, Rows<const E>, Rows<const E>, int64_t, Vectors<E>, Activation<E>, Rows<E>, int64_t, Sums<E>,      \
      Sums<E>, void*);                                                                                                \
  template const char* spread_mask_sums<E>(                                                                           \
      const E*, const E*, Vectors<E>, Activation<E>, E*, const Pool&, int64_t, Sums<E>, Sums<E>, void*);              \
  template const char* send<E>(                                                                                       \
      Rows<const E>, const Part<E>*, int64_t, Vectors<E>, Activation<E>, int64_t, int64_t, Sums<E>, Sums<E>, void*)
INSTANTIATE(float);
INSTANTIATE(double);
INSTANTIATE(bfloat16);
INSTANTIATE(float16);

}  // namespace thresholdnet::pixels
