// Launchers of the convolution: pack the operands in K order, multiply, merge the tiles' sums. See conv.h.
#include "conv_halo.cuh"
#include "conv_mma.cuh"
#include "merging.cuh"

namespace thresholdnet::convolution {
namespace {

constexpr int PACKING_THREADS = 128;
constexpr int AT_ONCE = 8;  // tiles that a slice has on their way from memory

// packed[n, k] = weight[n, weight_index[k]]; zeros where there is none and behind the last channel.
__global__ void pack_weight(const Arguments p, int all_k) {
  const int at = blockIdx.x * PACKING_THREADS + threadIdx.x;
  if (at >= p.columns * all_k) return;
  const int n = at / all_k, index = n < p.channels ? p.weight_index[at % all_k] : -1;
  const auto* weight = static_cast<const uint16_t*>(p.weight);  // moved, not computed with
  static_cast<uint16_t*>(p.packed)[at] = index < 0 ? 0 : weight[static_cast<int64_t>(n) * p.weight_columns + index];
}

// packed_affine[0, k] = scale[channel[k]], packed_affine[1, k] = shift[channel[k]]; zeros where there is none.
__global__ void pack_affine(const Arguments p, int length) {
  const int k = blockIdx.x * PACKING_THREADS + threadIdx.x;
  if (k >= length) return;
  const int channel = p.channel[k];
  p.packed_affine[k] = channel < 0 ? 0 : p.scale[channel];
  p.packed_affine[length + k] = channel < 0 ? 0 : p.shift[channel];
}

// Adds up number(load(t)) over the tiles of a slice: AT_ONCE loads, then as many sums side by side.
template <class Load, class Number>
__device__ __forceinline__ float over_tiles(unsigned tiles, const Load& load, const Number& number) {
  const unsigned step = slices();
  float sum[AT_ONCE] = {};
  for (unsigned t = threadIdx.x / MERGED; t < tiles; t += AT_ONCE * step) {
    decltype(load(t)) found[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u) found[u] = load(t + u * step < tiles ? t + u * step : t);
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u) sum[u] += t + u * step < tiles ? number(found[u]) : 0.0f;
  }
#pragma unroll
  for (int half = AT_ONCE / 2; half > 0; half /= 2) {
#pragma unroll
    for (int u = 0; u < half; ++u) sum[u] += sum[u + half];
  }
  return sum[0];
}

struct Tile {
  float sum, squares;
  int pixels;
};

// The tiles' partial sums to moments. With s_t a tile's sum, M2_t its squares around its own mean, n_t its pixels:
//   mean = sum s_t / n,   variance = sum (M2_t + n_t (s_t / n_t - mean)^2) / n      (Chan: no cancellation)
__global__ void __launch_bounds__(MERGING_THREADS, 1) merge(const Arguments p, unsigned tiles) {
  SHARED_ARRAY(float, shared, [MERGING_WARPS * MERGED]);
  const int slice = threadIdx.x / MERGED;
  const int channel = blockIdx.x * MERGED + threadIdx.x % MERGED;
  const bool moments = p.epilogue == Epilogue::statistics;
  const float pixels = static_cast<float>(p.batch * p.height * p.width);
  const float* sums = p.partial + channel;
  const int64_t step = 2 * p.columns;
  const auto sum = [&](unsigned t) { return sums[t * step]; };
  const auto other = [&](unsigned t) { return sums[t * step + p.columns]; };
  const auto itself = [](float value) { return value; };
  float first = over_slices(shared, over_tiles(tiles, sum, itself)), second = 0;
  if (moments) {
    first /= pixels;
    second = over_tiles(
        tiles, [&](unsigned t) { return Tile{sum(t), other(t), p.tile_pixels[t]}; },
        [&](const Tile& tile) {
          const float count = static_cast<float>(tile.pixels), away = tile.sum / count - first;
          return tile.squares + count * away * away;
        });
  } else {
    second = over_tiles(tiles, other, itself);
  }
  second = over_slices(shared, second);
  if (slice || channel >= p.channels) return;
  p.moments[channel] = first;
  p.moments[p.channels + channel] = moments ? second / pixels : second;
}

template <class E, int COLUMNS>
const char* multiply_tiles(const Arguments& p, int64_t blocks, void* stream) {
  if (p.form == Form::gemm && p.affine) {
    return launch(
        conv_mma<E, COLUMNS, true>, blocks, THREADS, GemmShape<COLUMNS, true>::SHARED_BYTES, stream, p);
  }
  if (p.form == Form::gemm) {
    return launch(
        conv_mma<E, COLUMNS, false>, blocks, THREADS, GemmShape<COLUMNS, false>::SHARED_BYTES, stream, p);
  }
  if constexpr (COLUMNS <= 32) {
    if (p.form == Form::wide) {
      return launch(
          conv_halo<E, COLUMNS, 8, 16>, blocks, THREADS, HaloShape<COLUMNS, 8, 16>::SHARED_BYTES, stream, p);
    }
    return launch(
        conv_halo<E, COLUMNS, 16, 8>, blocks, THREADS, HaloShape<COLUMNS, 16, 8>::SHARED_BYTES, stream, p);
  }
  return "a halo takes column tiles of 16 or 32";
}

template <class E>
const char* by_columns(const Arguments& p, int64_t blocks, void* stream) {
  switch (p.column_tile) {
    case 16: return multiply_tiles<E, 16>(p, blocks, stream);
    case 32: return multiply_tiles<E, 32>(p, blocks, stream);
    default: return multiply_tiles<E, 64>(p, blocks, stream);
  }
}

int blocks_for(int64_t items) { return static_cast<int>((items + PACKING_THREADS - 1) / PACKING_THREADS); }

}  // namespace

int64_t tiles(Form form, int64_t batch, int64_t height, int64_t width) {
  const auto over = [](int64_t length, int64_t tile) { return (length + tile - 1) / tile; };
  if (form == Form::gemm) return over(batch * height * width, ROWS);
  return form == Form::wide ? batch * over(height, 8) * over(width, 16) : batch * over(height, 16) * over(width, 8);
}

const char* run(const Arguments& p, void* stream) {
  const int64_t all_k = k_rows(p.form, p.chunks), all_tiles = tiles(p.form, p.batch, p.height, p.width);
  const int64_t blocks = all_tiles * (p.columns / p.column_tile);
  if (blocks > INT32_MAX || all_k * p.columns > INT32_MAX) return "it takes more than 2^31 tiles or weights";
  const char* problem = nullptr;
  if (all_k) {
    const int packed = blocks_for(all_k * p.columns);
    problem = launch(pack_weight, packed, PACKING_THREADS, 0, stream, p, static_cast<int>(all_k));
  }
  if (!problem && p.affine) {
    const int length = (p.chunks + 1) * CHUNK;
    problem = launch(pack_affine, blocks_for(length), PACKING_THREADS, 0, stream, p, length);
  }
  if (!problem) {
    problem = p.element == Element::bf16 ? by_columns<bf16>(p, blocks, stream) : by_columns<fp16>(p, blocks, stream);
  }
  if (!problem && (p.epilogue == Epilogue::statistics || p.epilogue == Epilogue::mask)) {
    const int merged = (p.channels + MERGED - 1) / MERGED;
    const int threads = merging_threads(all_tiles, AT_ONCE);
    problem = launch(merge, merged, threads, 0, stream, p, static_cast<unsigned>(all_tiles));
  }
  return problem;
}

}  // namespace thresholdnet::convolution
