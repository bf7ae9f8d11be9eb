// Winograd's F(4x4, 3x3) for float32: a 3x3 convolution, padding 1, with 36 products a 4x4 tile of outputs for 144.
//
//   out = A^T [ sum_c (G w_c G^T) * (B^T d_c B) ] A                 (Lavin and Gray 2016, arXiv:1509.09308, points
//   dw_c = G^T [ sum_tiles (A dout A^T) * (B^T d_c B) ] G            0, 1, -1, 2, -2 and infinity; * is elementwise)
//
// d_c is the 6x6 patch of input channel c around a tile, zeros outside the image. Transforms belong to tensors, not to
// convolutions: all readers of a tensor share B^T d B. At each of the 36 positions the sum over channels is a matrix
// product, and the channels may come from several tensors: nothing is concatenated. The gradient of d is the same
// convolution of dout with the weights transposed and turned by 180 degrees.
//
// Letters: f position 0..35; a tile's number counts over images, then down, then across. Tiles stand in blocks of
// TILES, the last one filled up with zeros: a transformed tensor is [blocks, 36, TILES, channels]. K: channels that are
// read; O: channels that are written. No torch here; no function's result depends on how blocks are shared among threads.
#pragma once
#include "rows.h"

namespace thresholdnet {

constexpr int64_t POSITIONS = 36;
constexpr int64_t TILES = 24;         // a block's products, 36 x TILES x GROUP floats, stay in a core's cache
constexpr int64_t GROUP = 64;         // outputs that are computed at once, at most
constexpr int64_t GRADIENT_PAD = 16;  // channels of a transformed gradient are padded to this: any vector's lanes

struct Grid {  // the tiles of [images, height, width] outputs
  int64_t height, width, down, across, tiles;
  Grid(int64_t images, int64_t h, int64_t w)
      : height(h), width(w), down((h + 3) / 4), across((w + 3) / 4), tiles(images * down * across) {}
  int64_t blocks() const { return (tiles + TILES - 1) / TILES; }
};

struct Source {  // a transformed tensor, or the part of it from some block and position on
  const float* data;
  int64_t channels;
};

struct Taps {  // weights of one input channel: element (o, y, x) at data[o * output + y * row + x * column]
  const float* data;
  int64_t output, row, column;
};

struct Packed {  // transformed weights, [36][outputs padded to lanes / (2 * lanes)][entries][2 * lanes], see pack
  int64_t entries, outputs;
};

struct Finish {  // out = act(convolution + bias + add); null: none
  const float* bias;
  Rows<const float> add;
  Range<float> act;
};

struct Winograd {
  int64_t lanes;  // outputs are padded to a multiple of it
  // B^T d B of one block, into [36, TILES, channels]; `zeros`: as many as there are channels
  void (*transform)(
      Rows<const float> x, int64_t channels, const Grid& grid, const float* zeros, float* out, int64_t block);
  // A dout A^T of one block, into [36, TILES, width] with zeros in the columns behind `channels`
  void (*transform_gradient)(
      Rows<const float> x, int64_t channels, const Grid& grid, const float* zeros, float* out, int64_t width,
      int64_t block);
  // G w G^T of the entries [first, last), which are input channels, for the vector of outputs that starts at o
  void (*pack)(
      const Taps* taps, int64_t first, int64_t last, int64_t o, int64_t outputs, Packed shape, float* packed);
  // One block of the outputs [first, last); `products` has room for 36 x TILES x (last - first padded to lanes) floats
  void (*convolve)(
      const Source* sources, int64_t count, const float* packed, Packed shape, int64_t first, int64_t last,
      const Grid& grid, int64_t block, const Finish& finish, float* products, Rows<float> out);
  // sums [channels of the source, outputs padded to lanes] = at position f, the sum over tiles of source x gradient
  void (*correlate)(
      Source source, Source gradient, int64_t blocks, int64_t f, int64_t outputs, float* sums);
  // dw[o, y, x] = dw[o * 9 * K + 3 y + x] of one input channel, from its row of sums [36, K, outputs padded to lanes]
  void (*finish_gradient)(const float* sums, int64_t plane, int64_t outputs, float* dw, int64_t output_stride);
};

extern const Winograd baseline_winograd;
#if defined(__x86_64__)
extern const Winograd avx2_winograd, avx512_winograd;
#endif

}  // namespace thresholdnet
