// From the accumulators of a tile to the slot: see conv.h for what the epilogues compute.
//
// The warps first lay their fragments down in shared memory as fp32, so that each thread then has 8 channels of a pixel
// before it: one load and one store of 16 bytes. It keeps the channels while it goes over the pixels, so the sums of a
// channel are a register, then a shuffle within the warp, then four numbers in shared memory: a fixed order.
#pragma once
#include "conv.h"
#include "device.cuh"

namespace thresholdnet::convolution {

template <int COLUMNS>
struct TileShape {
  static constexpr int PITCH = COLUMNS + 8;  // floats from pixel to pixel: fragments are laid down without conflicts
  static constexpr int GROUPS = COLUMNS / 8;
  static constexpr int STEP = THREADS / GROUPS;  // pixels that the threads have before them at once
  static constexpr int WARPS = THREADS / 32;
  static constexpr int BYTES = (ROWS * PITCH + WARPS * COLUMNS) * static_cast<int>(sizeof(float));
};

template <int COLUMNS>
using Accumulators = float[2][COLUMNS / 8][4];  // of a warp: 2 x 16 pixels, COLUMNS / 8 x 8 channels

template <int COLUMNS>
__device__ inline void lay_down(float* tile, const Accumulators<COLUMNS>& acc) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = warp * 32 + i * 16 + h * 8 + lane / 4, column = j * 8 + lane % 4 * 2;
        store_aligned(
            tile + row * TileShape<COLUMNS>::PITCH + column, make_float2(acc[i][j][2 * h], acc[i][j][2 * h + 1]));
      }
    }
  }
}

// Adds up 8 channels over all threads that hold them; found [WARPS, COLUMNS] then has one number a warp.
template <int COLUMNS>
__device__ inline void add_up(float (&value)[8], float* found) {
  using Shape = TileShape<COLUMNS>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int away = Shape::GROUPS; away < 32; away *= 2) value[i] += shuffle_xor(value[i], away);
  }
  if (lane < Shape::GROUPS) {
#pragma unroll
    for (int i = 0; i < 8; ++i) found[warp * COLUMNS + lane * 8 + i] = value[i];
  }
  __syncthreads();
}

template <int COLUMNS>
__device__ inline float of_all_warps(const float* found, int column) {
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < TileShape<COLUMNS>::WARPS; ++warp) sum += found[warp * COLUMNS + column];
  return sum;
}

__device__ inline void read8(float (&to)[8], const float* row) {
  const auto low = load_aligned<float4>(row), high = load_aligned<float4>(row + 4);
  to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
  to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}

__device__ inline void write8(float* row, const float (&from)[8]) {
  store_aligned(row, make_float4(from[0], from[1], from[2], from[3]));
  store_aligned(row + 4, make_float4(from[4], from[5], from[6], from[7]));
}

// Vectors [channels] at 8 channels; zeros behind the last.
__device__ inline void load8(float (&to)[8], const float* vector, int first, int channels) {
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = first + i < channels ? vector[first + i] : 0.0f;
}

// Writes a tile of `count` pixels and its partial sums. shared: TileShape::BYTES that nobody reads any more; pixel_of(r):
// the pixel in row r of the tile, negative where there is none.
template <class E, int COLUMNS, class PixelOf>
__device__ inline void finish(
    const Arguments& p, float* shared, const Accumulators<COLUMNS>& acc, int64_t tile, int first_column, int count,
    const PixelOf& pixel_of) {
  using Shape = TileShape<COLUMNS>;
  float* values = shared;
  float* found = shared + ROWS * Shape::PITCH;
  lay_down<COLUMNS>(values, acc);
  __syncthreads();

  const int thread = threadIdx.x, group = thread % Shape::GROUPS, first_row = thread / Shape::GROUPS;
  const int channel = first_column + group * 8;
  const int last_row = channel < (p.channels + 7) / 8 * 8 ? ROWS : 0;  // no pixel at all where no slot is
  E* out = static_cast<E*>(p.out) + channel;
  const E* raw = static_cast<const E*>(p.raw) + channel;
  const bool mask = p.epilogue == Epilogue::mask;
  float scale[8], shift[8], mean[8], rstd[8], sum[8] = {}, other[8] = {};
  if (p.epilogue == Epilogue::bias) load8(shift, p.vectors[0], channel, p.channels);
  if (mask) {
    load8(scale, p.vectors[0], channel, p.channels);
    load8(shift, p.vectors[1], channel, p.channels);
    load8(mean, p.vectors[2], channel, p.channels);
    load8(rstd, p.vectors[3], channel, p.channels);
  }
  for (int r = first_row; r < last_row; r += Shape::STEP) {
    const int64_t pixel = pixel_of(r);
    if (pixel < 0) continue;
    float* row = values + r * Shape::PITCH + group * 8;
    E* to = out + pixel * (p.out_row8 * 8);
    float value[8], z[8];
    read8(value, row);
    if (p.add) {
      float before[8];
      unpack8<E>(before, load_aligned<uint4>(to));
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] += before[i];
    }
    if (mask) unpack8<E>(z, load_aligned<uint4>(raw + pixel * (p.raw_row8 * 8)));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (p.epilogue == Epilogue::bias) value[i] = activate(value[i] + shift[i], p.act);
      if (mask) value[i] = behind_activation(value[i], z[i] * scale[i] + shift[i], p.act);
      if (channel + i >= p.channels) value[i] = 0;
    }
    const uint4 rounded = pack8<E>(value);
    store_aligned(to, rounded);
    unpack8<E>(value, rounded);
    write8(row, value);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sum[i] += value[i];
      if (mask) other[i] += value[i] * ((z[i] - mean[i]) * rstd[i]);
    }
  }
  if (p.epilogue == Epilogue::plain || p.epilogue == Epilogue::bias) return;

  float* partial = p.partial + tile * 2 * p.columns + first_column;
  add_up<COLUMNS>(sum, found);
  if (thread < COLUMNS) partial[thread] = of_all_warps<COLUMNS>(found, thread);
  if (p.epilogue == Epilogue::statistics) {
    if (thread == 0 && first_column == 0) p.tile_pixels[tile] = count;
#pragma unroll
    for (int i = 0; i < 8; ++i) mean[i] = of_all_warps<COLUMNS>(found, group * 8 + i) / count;
    for (int r = first_row; r < last_row; r += Shape::STEP) {
      if (pixel_of(r) < 0) continue;
      float value[8];
      read8(value, values + r * Shape::PITCH + group * 8);
#pragma unroll
      for (int i = 0; i < 8; ++i) other[i] += (value[i] - mean[i]) * (value[i] - mean[i]);
    }
  }
  __syncthreads();
  add_up<COLUMNS>(other, found);
  if (thread < COLUMNS) partial[p.columns + thread] = of_all_warps<COLUMNS>(found, thread);
}

}  // namespace thresholdnet::convolution
