// 3x3 convolution that reads a pixel about once: a block computes TALL x LONG = ROWS pixels x COLUMNS output channels.
//
// A stage holds 32 channels of the tile and of the border around it, its halo, and the weights of all nine taps. A tap
// is a shift of the rows that ldmatrix reads, so the halo is copied once where the implicit product copies it nine
// times; pixels outside the image are zeros. K is packed as (chunk of channels, tap, channel).
//
// Letters as in conv_mma.cuh; (y, x) pixel of the halo, whose first one lies at (top - 1, left - 1) of the image.
#pragma once
#include "conv_mma.cuh"

namespace thresholdnet::convolution {

template <int COLUMNS, int TALL, int LONG>
struct HaloShape {
  static_assert(TALL * LONG == ROWS, "a tile holds the pixels of four warps");
  static constexpr int HALO = (TALL + 2) * (LONG + 2);  // pixels
  static constexpr int A = HALO * PITCH, B = 9 * COLUMNS * PITCH;  // elements
  static constexpr int STAGE_BYTES = (A + B) * 2;
  static constexpr int SHARED_BYTES =
      2 * STAGE_BYTES > TileShape<COLUMNS>::BYTES ? 2 * STAGE_BYTES : TileShape<COLUMNS>::BYTES;
};

template <class E, int COLUMNS, int TALL, int LONG>
__global__ void __launch_bounds__(THREADS) conv_halo(const Arguments p) {
  using Shape = HaloShape<COLUMNS, TALL, LONG>;
  SHARED_MEMORY(shared);
  const int thread = threadIdx.x;
  const int column_tiles = p.columns / COLUMNS, first_column = blockIdx.x % column_tiles * COLUMNS;
  const int height = static_cast<int>(p.height), width = static_cast<int>(p.width);
  const int across = (width + LONG - 1) / LONG, down = (height + TALL - 1) / TALL;
  const int tile = blockIdx.x / column_tiles;
  const int top = tile / across % down * TALL, left = tile % across * LONG;
  const int64_t image = static_cast<int64_t>(tile / (across * down)) * height * width;  // its first pixel
  const int64_t all_k = static_cast<int64_t>(p.chunks) * 9 * CHUNK;
  const E* weight = static_cast<const E*>(p.packed) + first_column * all_k;

  const auto copy = [&](int chunk) {
    E* a = reinterpret_cast<E*>(shared + chunk % 2 * Shape::STAGE_BYTES);
    E* b = a + Shape::A;
    const int group = thread % 4;
    const int64_t first = (p.entries[chunk * 4 + group] >> 5), row8 = p.row8[chunk * 4 + group];
    for (int at = thread / 4; at < Shape::HALO; at += THREADS / 4) {
      const int y = top + at / (LONG + 2) - 1, x = left + at % (LONG + 2) - 1;
      const bool valid = y >= 0 && y < height && x >= 0 && x < width;
      const int64_t pixel = image + y * width + x;
      copy16(a + at * PITCH + group * 8, static_cast<const E*>(p.source) + (pixel * row8 + first) * 8, valid);
    }
    for (int at = thread / 4; at < 9 * COLUMNS; at += THREADS / 4) {
      const int tap = at / COLUMNS, column = at % COLUMNS;
      copy16(b + at * PITCH + group * 8, weight + column * all_k + (chunk * 9 + tap) * CHUNK + group * 8, true);
    }
  };

  float acc[2][COLUMNS / 8][4] = {};
  if (p.chunks) copy(0);
  commit_copies();
  for (int chunk = 0; chunk < p.chunks; ++chunk) {
    if (chunk + 1 < p.chunks) copy(chunk + 1);
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();
    const E* a = reinterpret_cast<const E*>(shared + chunk % 2 * Shape::STAGE_BYTES);
    const E* b = a + Shape::A;
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
#pragma unroll
      for (int k = 0; k < CHUNK; k += 16) {
        multiply<E, COLUMNS>(
            acc, a + k, b + tap * COLUMNS * PITCH + k,
            [&](int row) {
              const int pixel = thread / 32 * 32 + row;
              return (pixel / LONG + tap / 3) * (LONG + 2) + pixel % LONG + tap % 3;
            },
            [](uint32_t(&)[4]) {});
      }
    }
    __syncthreads();
  }
  wait_for_copies<0>();
  __syncthreads();
  const int rows = height - top < TALL ? height - top : TALL, columns = width - left < LONG ? width - left : LONG;
  finish<E, COLUMNS>(
      p, reinterpret_cast<float*>(shared), acc, tile, first_column, rows * columns, [&](int row) -> int64_t {
        const int y = row / LONG, x = row % LONG;
        return y < rows && x < columns ? image + (top + y) * width + left + x : -1;
      });
}

}  // namespace thresholdnet::convolution
