// Convolution as an implicit matrix product, 1x1 and 3x3: a block computes ROWS pixels x COLUMNS output channels.
//
//   acc[m, n] += sum over the 32 k of a chunk of A[m, k] W[n, k],    mma m16n8k16, chunk after chunk
//
// Three stages of shared memory hold the chunks in flight. A thread copies the same 8-channel group of four pixels, so
// it needs one entry of the K table a chunk; the entry is loaded one chunk ahead of its copies. Copies go through L1,
// because the taps of a chunk lie side by side in K and read the same pixels again.
//
// With AFFINE the scale and shift of a chunk's 32 channels lie beside it; they act on the fragments, in fp32.
//
// Letters: m pixel; n output channel; k position in K, see conv.h; A, B: the tiles of pixels and of packed weights.
#pragma once
#include "conv_epilogue.cuh"

namespace thresholdnet::convolution {

constexpr int PITCH = CHUNK + 8;  // elements from row to row of A and B: ldmatrix reads without bank conflicts

template <int COLUMNS, bool AFFINE>
struct GemmShape {
  static constexpr int STAGES = 3;
  static constexpr int A = ROWS * PITCH, B = COLUMNS * PITCH;  // elements
  static constexpr int STAGE_BYTES = (A + B) * 2 + (AFFINE ? 2 * CHUNK * 4 : 0);
  static constexpr int SHARED_BYTES =
      STAGES * STAGE_BYTES > TileShape<COLUMNS>::BYTES ? STAGES * STAGE_BYTES : TileShape<COLUMNS>::BYTES;
};

// acc += A B for 16 k: `a` and `b` start at the warp's first pixel, the first channel, and the first k.
// row_of(r): where pixel r of the warp's 32 lies, in rows of A. on_load(fragments): what happens to A first.
template <class E, int COLUMNS, class RowOf, class OnLoad>
__device__ inline void multiply(
    Accumulators<COLUMNS>& acc, const E* a, const E* b, const RowOf& row_of, const OnLoad& on_load) {
  const int lane = threadIdx.x % 32;
  uint32_t left[2][4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    load_matrix(left[i], a + row_of(i * 16 + lane % 16) * PITCH + lane / 16 * 8);
    on_load(left[i]);
  }
#pragma unroll
  for (int j = 0; j < COLUMNS / 16; ++j) {
    uint32_t right[4];
    load_matrix(right, b + (j * 16 + lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 8);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      mma<E>(acc[i][2 * j], left[i], right);
      mma<E>(acc[i][2 * j + 1], left[i], right + 2);
    }
  }
}

// act(pixel * scale + shift) on a fragment of A; `scale` and `shift` start at its first k.
template <class E>
__device__ inline void apply_affine(uint32_t (&fragment)[4], const float* scale, const float* shift, Range<float> act) {
  const int first = threadIdx.x % 4 * 2;
#pragma unroll
  for (int q = 0; q < 4; ++q) {  // registers 0, 1: k 0..7 of two pixels; 2, 3: k 8..15
    const int k = first + q / 2 * 8;
    float2 pair = unpack2<E>(fragment[q]);
    pair.x = activate(pair.x * scale[k] + shift[k], act);
    pair.y = activate(pair.y * scale[k + 1] + shift[k + 1], act);
    fragment[q] = pack2<E>(pair.x, pair.y);
  }
}

template <class E, int COLUMNS, bool AFFINE>
__global__ void __launch_bounds__(THREADS) conv_mma(const Arguments p) {
  using Shape = GemmShape<COLUMNS, AFFINE>;
  SHARED_MEMORY(shared);
  const int thread = threadIdx.x, group = thread % 4, first_row = thread / 4;
  const int column_tiles = p.columns / COLUMNS;
  const int64_t tile = blockIdx.x / column_tiles, pixels = p.batch * p.height * p.width;
  const int first_column = blockIdx.x % column_tiles * COLUMNS;
  const int64_t all_k = static_cast<int64_t>(p.chunks) * CHUNK, first_pixel = tile * ROWS + first_row;

  uint32_t inside[4];  // of the four pixels that this thread copies: bit t, tap t lies inside the image
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t pixel = first_pixel + 32 * i;
    inside[i] = pixel >= pixels ? 0 : p.taps_inside ? static_cast<uint32_t>(p.taps_inside[pixel]) : 1;
  }
  int next = 0;  // chunk that is copied next, with its entry
  int32_t entry = p.entries[group];
  int64_t row8 = p.row8[group];
  const auto copy_next = [&] {
    if (next < p.chunks) {
      E* a = reinterpret_cast<E*>(shared + next % Shape::STAGES * Shape::STAGE_BYTES);
      E* b = a + Shape::A;
      const E* from = static_cast<const E*>(p.source) + (first_pixel * row8 + (entry >> 5)) * 8;
      const E* weight = static_cast<const E*>(p.packed) + (first_column + first_row) * all_k + next * CHUNK + group * 8;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool valid = inside[i] >> (entry & 31) & 1;
        copy16(a + (first_row + 32 * i) * PITCH + group * 8, from + i * (32 * 8 * row8), valid);
      }
#pragma unroll
      for (int i = 0; i < (COLUMNS + 31) / 32; ++i) {
        if (COLUMNS % 32 == 0 || first_row + 32 * i < COLUMNS)
          copy16(b + (first_row + 32 * i) * PITCH + group * 8, weight + 32 * i * all_k, true);
      }
      if (AFFINE && thread < 2 * CHUNK / 4) {
        const int which = thread / (CHUNK / 4), k = thread % (CHUNK / 4) * 4;
        float* to = reinterpret_cast<float*>(b + Shape::B) + which * CHUNK + k;
        copy16(to, p.packed_affine + which * (all_k + CHUNK) + next * CHUNK + k, true);
      }
      ++next;
      entry = p.entries[next * 4 + group];  // the table has a chunk to spare
      row8 = p.row8[next * 4 + group];
    }
    commit_copies();  // an empty group where nothing is left, so that the count of groups stays true
  };

  float acc[2][COLUMNS / 8][4] = {};
  for (int stage = 0; stage < Shape::STAGES - 1; ++stage) copy_next();
  for (int chunk = 0; chunk < p.chunks; ++chunk) {
    wait_for_copies<Shape::STAGES - 2>();
    __syncthreads();
    copy_next();
    const E* a = reinterpret_cast<const E*>(shared + chunk % Shape::STAGES * Shape::STAGE_BYTES);
    const E* b = a + Shape::A;
    const float* scale = reinterpret_cast<const float*>(b + Shape::B);
    const E* own = a + thread / 32 * 32 * PITCH;
#pragma unroll
    for (int k = 0; k < CHUNK; k += 16) {
      multiply<E, COLUMNS>(
          acc, own + k, b + k, [](int row) { return row; },
          [&](uint32_t(&fragment)[4]) {
            if (AFFINE) apply_affine<E>(fragment, scale + k, scale + CHUNK + k, p.act);
          });
    }
  }
  wait_for_copies<0>();
  __syncthreads();
  const int64_t left = pixels - tile * ROWS;
  finish<E, COLUMNS>(
      p, reinterpret_cast<float*>(shared), acc, tile, first_column, left < ROWS ? static_cast<int>(left) : ROWS,
      [&](int row) { return row < left ? tile * ROWS + row : -1; });
}

}  // namespace thresholdnet::convolution
