// From pixels to the windows that hold them and back, for windows side by side (kernel = stride, no padding).
//
// Rows are numbered in 32 bits: a division of 64 bits costs more than the rest of a pass.
#pragma once
#include "passes_pieces.cuh"

namespace thresholdnet::pixels {

struct Sides {  // of the images, and of the pooled ones
  unsigned height, width, out_height, out_width;
  int kernel;
};

// The pixel at which window r begins.
__device__ __forceinline__ int64_t first_pixel(const Sides& s, unsigned r, unsigned size) {
  const unsigned line = r / s.out_width, x = r - line * s.out_width;
  const unsigned image = line / s.out_height, y = line - image * s.out_height;
  return static_cast<int64_t>(image * s.height + y * size) * s.width + x * size;
}

// The window that holds pixel r, -1 where none does.
__device__ __forceinline__ int64_t window_of(const Sides& s, unsigned r, unsigned size) {
  const unsigned line = r / s.width, x = (r - line * s.width) / size;
  const unsigned image = line / s.height, y = (line - image * s.height) / size;
  if (x >= s.out_width || y >= s.out_height) return -1;
  return static_cast<int64_t>(image * s.out_height + y) * s.out_width + x;
}

inline Sides sides_of(const Pool& pool) {
  const auto small = [](int64_t length) { return static_cast<unsigned>(length); };
  return {small(pool.height), small(pool.width), small(pool.out_height), small(pool.out_width),
          static_cast<int>(pool.kernel)};
}

// What the numbers have no room for; null: nothing.
inline const char* sides_problem(const Pool& pool, int64_t images) {
  return images * pool.height * pool.width > INT32_MAX ? "windows are found among 2^31 - 1 pixels at most" : nullptr;
}

}  // namespace thresholdnet::pixels
