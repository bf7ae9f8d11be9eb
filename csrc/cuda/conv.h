// Launchers of the tensor-core convolution; no torch in here. The tables are those of kernels/tables.py.
//
//   acc[m, n] = sum over k of A[m, k] W[n, k]
//   A[m, k]   = source[m * row(k) + delta(k)] where tap(k) of pixel m lies inside the image, else 0
//   with an affine, A[m, k] = act(that * scale(k) + shift(k)): BatchNorm and activation on load, for 1x1 kernels
//
// and one of these writes the slot `out`, zeros into its padding:
//
//   plain       out = [out +] acc
//   statistics  z = round(acc), out = z; moments[0] = mean of z over all pixels, moments[1] = its biased variance
//   bias        out = act(acc + bias)
//   mask        g = [out +] acc times the activation's derivative at z * scale + shift; out = round(g);
//               moments[0] = sum of round(g), moments[1] = sum of round(g) * (z - mean) * rstd
//
// Products of bf16 or fp16, sums in fp32; every output element is written once, by one thread, and partial sums are
// merged in a fixed order.
//
// Letters: m pixel, n output channel, k position in K, a list of (8-channel group, tap) pairs in chunks of CHUNK; row:
// elements from one pixel of a slot to the next. Names in 8: units of 8 elements.
#pragma once
#include <cstdint>

#include "../types.h"

namespace thresholdnet::convolution {

constexpr int ROWS = 128;     // pixels of a tile
constexpr int CHUNK = 32;     // K rows of one pipeline stage
constexpr int THREADS = 128;  // of a block: four warps, 32 pixels each

enum class Element : int { bf16, fp16 };
enum class Epilogue : int { plain, statistics, bias, mask };
enum class Form : int {
  gemm,     // implicit matrix product: every tap reads its pixels again
  wide,     // 3x3 only: a tile of 8 x 16 pixels and its border lies in shared memory, all nine taps read it there
  upright,  // the same, 16 x 8 pixels
};

struct Arguments {
  Element element;
  Form form;
  Epilogue epilogue;
  Range<float> act;
  bool add;        // to what out holds
  bool affine;     // scale and shift of what is read
  int64_t batch, height, width;
  int channels;        // of out, without its padding
  int columns;         // of the product: `column_tile` times the number of column tiles
  int column_tile;     // 16, 32 or 64
  int chunks;          // K / CHUNK; with a halo CHUNK channels each, else CHUNK (channel, tap) pairs
  int weight_columns;  // elements of `weight` an output channel
  int64_t out_row8, raw_row8;

  const void* source;           // first element of the slot that entries count from
  const void* weight;           // [channels, weight_columns]
  const int32_t* entries;       // [(chunks + 1) * CHUNK / 8]: (delta / 8) << 5 | tap
  const int32_t* row8;          // of the same length: row of each entry's slot
  const int32_t* weight_index;  // [K]: which of weight's columns, -1 for none
  const int32_t* channel;       // [chunks * CHUNK + CHUNK]: input channel of each K row, -1 for none; affine alone
  const int32_t* taps_inside;   // [pixels]: bit t where tap t lies inside the image; null: a 1x1 kernel
  const float *scale, *shift;   // per input channel; affine alone
  const float* vectors[4];      // bias; or scale, shift, mean, rstd of the mask
  const void* raw;              // z of the mask
  void* out;
  float* moments;  // [2, channels], statistics and mask

  void* packed;           // workspace [columns, K] of the element's type
  float* packed_affine;   // workspace [2, chunks * CHUNK + CHUNK]
  float* partial;         // workspace [tiles, 2, columns]
  int32_t* tile_pixels;   // workspace [tiles]
};

// Rows of K that one of `chunks` stands for.
inline int64_t k_rows(Form form, int64_t chunks) { return chunks * CHUNK * (form == Form::gemm ? 1 : 9); }

// Tiles of pixels.
int64_t tiles(Form form, int64_t batch, int64_t height, int64_t width);

// Packs the weight, convolves, merges the tiles' sums; null, or what went wrong.
const char* run(const Arguments& arguments, void* stream);

}  // namespace thresholdnet::convolution
