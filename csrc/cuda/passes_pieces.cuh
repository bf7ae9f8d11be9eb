// How the passes share tensors among blocks and threads.
//
// A tensor's channels are cut into pieces of at most COLUMNS columns; a column is `width` neighbouring channels, which
// one access of up to 16 bytes moves. A block has one piece of a tile of rows. A thread keeps its column, so vectors
// per channel stay in registers, and takes every `lanes`-th row: neighbouring threads move neighbouring bytes.
//
// The grid is one-dimensional: block = tile * pieces + piece. A launch has at most PIECES pieces, since they are passed
// by value; longer lists take several launches. Offsets of rows are 64-bit.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "device.cuh"
#include "passes.h"

namespace thresholdnet::pixels {

constexpr int THREADS = 256;  // of a block; kernels ask for 1 block, or ptxas spills registers to make room for more
constexpr int COLUMNS = 32;   // of a piece: 512 bytes in a row, and at least 8 lanes a block
constexpr int PIECES = 32;    // of a launch
constexpr int64_t SMALLEST_TILE = 64, MOST_TILES = 512;

inline int64_t rows_of_tile(int64_t rows) { return std::max(SMALLEST_TILE, (rows + MOST_TILES - 1) / MOST_TILES); }

template <class E>
constexpr int FULL_WIDTH = 16 / static_cast<int>(sizeof(E));

// What a pass reads and writes of a run of channels; null data: none.
template <class E>
struct Piece {
  Rows<const E> x, g, add;
  Rows<E> out;
  int channel;  // the first one, in vectors and sums
  int columns;
  int width;  // channels of a column
};

template <class E>
struct Pieces {
  int count;
  int64_t rows, tile_rows;
  Piece<E> at[PIECES];
};

template <class E>
bool allows(const Rows<E>& rows, int width) {
  const auto bytes = static_cast<int64_t>(width * sizeof(E));
  return !rows.data || (reinterpret_cast<uintptr_t>(rows.data) % bytes == 0 && rows.stride % width == 0);
}

// The widest columns that every tensor of the piece allows.
template <class E>
int width_of(const Piece<E>& piece, int64_t channels) {
  int width = FULL_WIDTH<E>;
  const auto fits = [&] {
    return channels % width == 0 && allows(piece.x, width) && allows(piece.g, width) && allows(piece.add, width) &&
        allows(piece.out, width);
  };
  while (!fits()) width /= 2;
  return width;
}

template <class E>
void move_on(Rows<E>& rows, int64_t channels) {
  if (rows.data) rows.data += channels;
}

// Appends a tensor of `channels` channels to a list; piece.channel is its first.
template <class E>
void append(std::vector<Piece<E>>& list, Piece<E> piece, int64_t channels) {
  piece.width = width_of(piece, channels);
  for (int64_t left = channels / piece.width; left > 0; left -= piece.columns) {
    piece.columns = static_cast<int>(std::min<int64_t>(left, COLUMNS));
    list.push_back(piece);
    const int moved = piece.columns * piece.width;
    move_on(piece.x, moved), move_on(piece.g, moved), move_on(piece.add, moved), move_on(piece.out, moved);
    piece.channel += moved;
  }
}

// Launches `kernel(pieces, arguments...)` for as many pieces at once as a launch takes.
template <class E, class... Parameters, class... Arguments>
const char* launch_pieces(
    void (*kernel)(Pieces<E>, Parameters...), const std::vector<Piece<E>>& list, int64_t rows, void* stream,
    const Arguments&... arguments) {
  const char* problem = nullptr;
  for (size_t first = 0; first < list.size() && rows > 0 && !problem; first += PIECES) {
    Pieces<E> pieces{};
    pieces.count = static_cast<int>(std::min<size_t>(PIECES, list.size() - first));
    pieces.rows = rows;
    pieces.tile_rows = rows_of_tile(rows);
    std::copy_n(list.begin() + first, pieces.count, pieces.at);
    problem = launch(kernel, pieces.count * tiles(rows), THREADS, 0, stream, pieces, arguments...);
  }
  return problem;
}

template <int W>
struct Width {
  static constexpr int value = W;
};

// Calls f with the width as a constant.
template <class E, class F>
__device__ __forceinline__ void by_width(int width, const F& f) {
  if constexpr (FULL_WIDTH<E> >= 8) {
    if (width == 8) return f(Width<8>());
  }
  if constexpr (FULL_WIDTH<E> >= 4) {
    if (width == 4) return f(Width<4>());
  }
  return width == 2 ? f(Width<2>()) : f(Width<1>());
}

// A thread's share of a tile: column, and rows first, first + lanes, ... before last.
struct Share {
  int64_t tile;
  int lanes, lane, column;
  int64_t first, last;
};

template <class E>
__device__ __forceinline__ Share share_of(const Pieces<E>& pieces, const Piece<E>& piece) {
  Share share;
  share.tile = blockIdx.x / pieces.count;
  share.lanes = THREADS / piece.columns;
  share.lane = threadIdx.x / piece.columns;
  share.column = threadIdx.x % piece.columns;
  const int64_t start = share.tile * pieces.tile_rows, end = start + pieces.tile_rows;
  share.last = end < pieces.rows ? end : pieces.rows;
  share.first = share.lane < share.lanes ? start + share.lane : share.last;  // threads to spare have no rows
  return share;
}

template <int W, class A>
__device__ __forceinline__ void load_vector(A (&to)[W], const A* vector, int first) {
#pragma unroll
  for (int i = 0; i < W; ++i) to[i] = vector[first + i];
}

// W elements as they are loaded: half formats in pairs, widened and rounded without taking words apart.
template <class E, int W>
using Raw = std::conditional_t<sizeof(E) == 2 && W % 2 == 0, Pack<uint32_t, (W + 1) / 2>, Pack<E, W>>;

template <class E, int W, class A>
__device__ __forceinline__ void widen_all(const Raw<E, W>& from, A (&to)[W]) {
  if constexpr (sizeof(E) == 2 && W % 2 == 0) {
#pragma unroll
    for (int i = 0; i < W / 2; ++i) {
      const float2 pair = unpack2<E>(from.at[i]);
      to[2 * i] = pair.x;
      to[2 * i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < W; ++i) to[i] = widen(from.at[i]);
  }
}

template <class E, int W, class A>
__device__ __forceinline__ void store_narrowed(E* to, const A (&from)[W]) {
  Raw<E, W> made;
  if constexpr (sizeof(E) == 2 && W % 2 == 0) {
#pragma unroll
    for (int i = 0; i < W / 2; ++i) made.at[i] = pack2<E>(from[2 * i], from[2 * i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < W; ++i) made.at[i] = narrow<E>(from[i]);
  }
  store_aligned(to, made);
}

}  // namespace thresholdnet::pixels
