// How the sums of tiles become those of channels: few blocks, which wait for memory and for each other's threads alone.
//
// A block has 8 channels, 32 bytes of a tile's floats. A slice of the tiles is one thread a channel, with several tiles
// on their way at once. Every order is fixed by the shapes alone.
#pragma once
#include "device.cuh"

namespace thresholdnet {

constexpr int MERGED = 8;  // channels of a merging block
constexpr int MERGING_THREADS = 1024, MERGING_WARPS = MERGING_THREADS / 32;  // at most

// Threads of a merging block: four warps, or as many as take all tiles with `each` of them at once.
inline int merging_threads(int64_t tiles, int each) {
  int threads = 128;
  while (threads < MERGING_THREADS && threads / MERGED * each < tiles) threads *= 2;
  return threads;
}

__device__ __forceinline__ int slices() { return blockDim.x / MERGED; }

// Adds up what a channel's slices have, for all of its threads. shared: MERGING_WARPS * MERGED numbers.
template <class A>
__device__ __forceinline__ A over_slices(A* shared, A value) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const auto over_warp = [](A sum) {  // 4 slices
    sum += shuffle_xor(sum, MERGED);
    return sum + shuffle_xor(sum, 2 * MERGED);
  };
  value = over_warp(value);
  __syncthreads();  // nobody reads the last numbers any more
  if (lane < MERGED) shared[warp * MERGED + lane] = value;
  __syncthreads();
  A sum = 0;
#pragma unroll
  for (int w = 0; w < MERGING_WARPS; w += 4) sum += w < warps ? shared[w * MERGED + lane] : A(0);
  return over_warp(sum);
}

}  // namespace thresholdnet
