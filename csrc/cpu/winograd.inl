// The loops of winograd.h. Included behind rows.inl and products.inl, once per instruction set, with WINOGRAD defined.
// Transforms walk a pixel's channels, one vector of them at a time. The matrix products are outer products of ROWS rows
// (tiles forward, input channels in the weight gradient) and two vectors of outputs.
#include "winograd.h"

namespace thresholdnet {
namespace {

constexpr int LANES = LANES_OF<float>;
using Lane = Vec<float, LANES>;
constexpr int64_t PANEL = 2 * LANES;
constexpr int64_t DEPTH = 8;  // blocks of tiles that the weight gradient adds up while they are in the cache
static_assert(TILES % ROWS == 0 && GROUP % PANEL == 0 && GRADIENT_PAD % LANES == 0, "blocks of whole rows and vectors");

// Calls f for every vector of channels; the last one overlaps the one before where channels do not fill it.
template <int W, class F>
INLINE void vectors(int64_t channels, const F& f) {
  if constexpr (W > 1) {
    if (channels < W) return vectors<W / 2>(channels, f);
  }
  int64_t c = 0;
  for (; c + W <= channels; c += W) f(c, Width<W>());
  if (c < channels) f(channels - W, Width<W>());
}

// One-dimensional transforms over values `step` apart, results `to` apart; in place where both are one.

template <class V>
INLINE void times_bt(const V* d, V* u, int step) {  // B^T: six to six
  const V d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
  const V even = d4 - 4 * d2, odd = d3 - 4 * d1, near = d4 - d2, far = 2 * (d3 - d1);
  u[0] = 4 * d0 - 5 * d2 + d4;
  u[step] = even + odd;
  u[2 * step] = even - odd;
  u[3 * step] = near + far;
  u[4 * step] = near - far;
  u[5 * step] = 4 * d1 - 5 * d3 + d5;
}

template <class V>
INLINE void times_at(const V* m, V* out, int step, int to) {  // A^T: six to four
  const V sum = m[step] + m[2 * step], difference = m[step] - m[2 * step];
  const V far_sum = m[3 * step] + m[4 * step], far_difference = m[3 * step] - m[4 * step];
  out[0] = m[0] + sum + far_sum;
  out[to] = difference + 2 * far_difference;
  out[2 * to] = sum + 4 * far_sum;
  out[3 * to] = difference + 8 * far_difference + m[5 * step];
}

template <class V>
INLINE void times_a(const V* g, V* u, int step, int to) {  // A: four to six
  const V even = g[0] + g[2 * step], odd = g[step] + g[3 * step];
  const V far_even = g[0] + 4 * g[2 * step], far_odd = 2 * g[step] + 8 * g[3 * step];
  u[0] = g[0];
  u[to] = even + odd;
  u[2 * to] = even - odd;
  u[3 * to] = far_even + far_odd;
  u[4 * to] = far_even - far_odd;
  u[5 * to] = g[3 * step];
}

template <class V>
INLINE void times_g(const V* w, V* v, int step, int to) {  // G: three to six
  const V near = (w[0] + w[2 * step]) * (-1.f / 6), middle = w[step] * (1.f / 6);
  const V far = w[0] * (1.f / 24) + w[2 * step] * (1.f / 6), far_middle = w[step] * (1.f / 12);
  v[0] = w[0] * (1.f / 4);
  v[to] = near - middle;
  v[2 * to] = near + middle;
  v[3 * to] = far + far_middle;
  v[4 * to] = far - far_middle;
  v[5 * to] = w[2 * step];
}

template <class V>
INLINE void times_gt(const V* m, V* w, int step, int to) {  // G^T: six to three
  const V sum = m[step] + m[2 * step], difference = m[2 * step] - m[step];
  const V far_sum = m[3 * step] + m[4 * step], far_difference = m[3 * step] - m[4 * step];
  w[0] = m[0] * (1.f / 4) - sum * (1.f / 6) + far_sum * (1.f / 24);
  w[to] = difference * (1.f / 6) + far_difference * (1.f / 12);
  w[2 * to] = (far_sum - sum) * (1.f / 6) + m[5 * step];
}

struct Corner {  // the first output of a tile
  int64_t image, y, x;
};

INLINE Corner corner_of(const Grid& grid, int64_t tile) {
  const int64_t down = tile / grid.across;
  return {down / grid.down, down % grid.down * 4, tile % grid.across * 4};
}

// The SIDE x SIDE pixels of a tile from `before` pixels before its corner on; those outside the image point to zeros.
template <int SIDE>
INLINE void patch(
    Rows<const float> x, const Grid& grid, Corner corner, int64_t before, const float* zeros, const float** at) {
  for (int a = 0; a < SIDE; ++a) {
    for (int b = 0; b < SIDE; ++b) {
      const int64_t row = corner.y - before + a, column = corner.x - before + b;
      const bool inside = row >= 0 && row < grid.height && column >= 0 && column < grid.width;
      const int64_t pixel = (corner.image * grid.height + row) * grid.width + column;
      at[a * SIDE + b] = inside ? x.data + pixel * x.stride : zeros;
    }
  }
}

INLINE void clear(float* out, int64_t from, int64_t width) {  // channels [from, width) of one tile
  for (int f = 0; f < POSITIONS; ++f) std::memset(out + f * TILES * width + from, 0, (width - from) * sizeof(float));
}

void transform(
    Rows<const float> x, int64_t channels, const Grid& grid, const float* zeros, float* out, int64_t block) {
  for (int64_t i = 0; i < TILES; ++i, out += channels) {
    const int64_t tile = block * TILES + i;
    if (tile >= grid.tiles) {
      clear(out, 0, channels);
      continue;
    }
    const float* at[36];
    patch<6>(x, grid, corner_of(grid, tile), 1, zeros, at);
    vectors<LANES>(channels, [&](int64_t c, auto width) {
      constexpr int W = decltype(width)::value;
      Vec<float, W> d[36];
      for (int k = 0; k < 6; ++k) {
        for (int a = 0; a < 6; ++a) d[6 * a + k] = load<W>(at[6 * a + k] + c);
        times_bt(d + k, d + k, 6);
      }
      for (int a = 0; a < 6; ++a) {
        times_bt(d + 6 * a, d + 6 * a, 1);
        for (int k = 0; k < 6; ++k) store<W>(out + (6 * a + k) * TILES * channels + c, d[6 * a + k]);
      }
    });
  }
}

void transform_gradient(
    Rows<const float> x, int64_t channels, const Grid& grid, const float* zeros, float* out, int64_t width,
    int64_t block) {
  for (int64_t i = 0; i < TILES; ++i, out += width) {
    const int64_t tile = block * TILES + i;
    if (tile >= grid.tiles) {
      clear(out, 0, width);
      continue;
    }
    clear(out, channels, width);
    const float* at[16];
    patch<4>(x, grid, corner_of(grid, tile), 0, zeros, at);
    vectors<LANES>(channels, [&](int64_t c, auto lanes_wide) {
      constexpr int W = decltype(lanes_wide)::value;
      Vec<float, W> g[16], u[24], q[6];
      for (int k = 0; k < 4; ++k) {
        for (int a = 0; a < 4; ++a) g[4 * a + k] = load<W>(at[4 * a + k] + c);
        times_a(g + k, u + k, 4, 4);
      }
      for (int a = 0; a < 6; ++a) {
        times_a(u + 4 * a, q, 1, 1);
        for (int k = 0; k < 6; ++k) store<W>(out + (6 * a + k) * TILES * width + c, q[k]);
      }
    });
  }
}

// Outputs stand in panels of two vectors, the last one of one vector where that is enough. A panel holds an entry's
// outputs side by side and follows the panel before: panel p starts at entries * p of its position's plane.
void pack(
    const Taps* taps, int64_t first, int64_t last, int64_t o, int64_t outputs, Packed shape, float* packed) {
  const int64_t panel = o / PANEL * PANEL, wide = panel + PANEL <= shape.outputs ? PANEL : LANES;
  float* to = packed + shape.entries * panel + first * wide + (o - panel);
  for (int64_t entry = first; entry < last; ++entry, to += wide) {
    float lined_up[9][LANES] = {};
    for (int64_t l = 0; l < LANES && o + l < outputs; ++l) {
      const float* w = taps[entry].data + (o + l) * taps[entry].output;
      for (int t = 0; t < 9; ++t) lined_up[t][l] = w[t / 3 * taps[entry].row + t % 3 * taps[entry].column];
    }
    Lane w[9], half[18], v[6];
    for (int t = 0; t < 9; ++t) w[t] = load<LANES>(lined_up[t]);
    for (int k = 0; k < 3; ++k) times_g(w + k, half + k, 3, 3);
    for (int a = 0; a < 6; ++a) {
      times_g(half + 3 * a, v, 1, 1);
      for (int k = 0; k < 6; ++k) store<LANES>(to + (6 * a + k) * shape.entries * shape.outputs, v[k]);
    }
  }
}

// products [ROWS, V vectors] of rows from `row` on: sum over all channels of all sources.
template <int V>
INLINE void multiply(
    const Source* sources, int64_t count, int64_t row, const float* weights, float* products, int64_t stride) {
  Sums<ROWS, V, float> sums = {};
  for (int64_t j = 0; j < count; ++j) {
    const int64_t channels = sources[j].channels;
    const float* x = sources[j].data + row * channels;
    const float* next = x + ROWS * channels;
    for (int64_t c = 0; c < channels; ++c, ++x, weights += V * LANES) {
      __builtin_prefetch(next + ROWS * c);  // the rows that follow, here or at the next position
      add_product(sums, x, channels, weights);
    }
  }
  store_sums(sums, products, stride);
}

void write_tile(
    const float* products, int64_t stride, int64_t first, int64_t channels, const Grid& grid, Corner corner,
    const Finish& finish, Rows<float> out) {
  const int64_t rows = grid.height - corner.y < 4 ? grid.height - corner.y : 4;
  const int64_t columns = grid.width - corner.x < 4 ? grid.width - corner.x : 4;
  const int64_t start = (corner.image * grid.height + corner.y) * grid.width + corner.x;
  vectors<LANES>(channels, [&](int64_t c, auto width) {
    constexpr int W = decltype(width)::value;
    Vec<float, W> half[24], q[4];
    for (int k = 0; k < 6; ++k) {
      Vec<float, W> m[6];
      for (int a = 0; a < 6; ++a) m[a] = load<W>(products + (6 * a + k) * TILES * stride + c);
      times_at(m, half + k, 1, 6);
    }
    const Vec<float, W> bias = finish.bias ? load<W>(finish.bias + first + c) : Vec<float, W>{};
    for (int64_t a = 0; a < rows; ++a) {
      times_at(half + 6 * a, q, 1, 1);
      for (int64_t b = 0; b < columns; ++b) {
        const int64_t pixel = start + a * grid.width + b;
        auto value = q[b] + bias;
        if (finish.add.data) value += load<W>(finish.add.data + pixel * finish.add.stride + first + c);
        store<W>(out.data + pixel * out.stride + first + c, clamp(value, finish.act));
      }
    }
  });
}

void convolve(
    const Source* sources, int64_t count, const float* packed, Packed shape, int64_t first, int64_t last,
    const Grid& grid, int64_t block, const Finish& finish, float* products, Rows<float> out) {
  const int64_t left = grid.tiles - block * TILES, tiles = left < TILES ? left : TILES;
  const int64_t stride = (last - first + LANES - 1) / LANES * LANES;
  for (int64_t f = 0; f < POSITIONS; ++f) {
    const float* weights = packed + f * shape.entries * shape.outputs;
    for (int64_t o = 0; o < stride; o += PANEL) {
      for (int64_t i = 0; i < tiles; i += ROWS) {
        const int64_t row = (block * POSITIONS + f) * TILES + i;
        float* to = products + (f * TILES + i) * stride + o;
        if (o + PANEL <= stride) {
          multiply<2>(sources, count, row, weights + shape.entries * (first + o), to, stride);
        } else {
          multiply<1>(sources, count, row, weights + shape.entries * (first + o), to, stride);
        }
      }
    }
  }
  for (int64_t i = 0; i < tiles; ++i) {
    const Corner corner = corner_of(grid, block * TILES + i);
    write_tile(products + i * stride, stride, first, last - first, grid, corner, finish, out);
  }
}

// sums [R, V vectors] += over `blocks` blocks of tiles: R channels of x times V vectors of g.
template <int R, int V>
INLINE void accumulate(
    const float* x, int64_t channels, const float* g, int64_t width, int64_t blocks, float* sums, int64_t stride) {
  Sums<R, V, float> found;
  load_sums(found, sums, stride);
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t start = k * POSITIONS * TILES;
    add_products(found, x + start * channels, channels, g + start * width, width, TILES);
  }
  store_sums(found, sums, stride);
}

// The same for `rows` <= R channels.
template <int R, int V>
void accumulate_some(
    int64_t rows, const float* x, int64_t channels, const float* g, int64_t width, int64_t blocks, float* sums,
    int64_t stride) {
  if constexpr (R > 0) {
    if (rows == R) return accumulate<R, V>(x, channels, g, width, blocks, sums, stride);
    accumulate_some<R - 1, V>(rows, x, channels, g, width, blocks, sums, stride);
  }
}

void correlate(Source source, Source gradient, int64_t blocks, int64_t f, int64_t outputs, float* sums) {
  const int64_t stride = (outputs + LANES - 1) / LANES * LANES, n = source.channels, m = gradient.channels;
  std::memset(sums, 0, n * stride * sizeof(float));
  for (int64_t k = 0; k < blocks; k += DEPTH) {
    const int64_t depth = blocks - k < DEPTH ? blocks - k : DEPTH, row = (k * POSITIONS + f) * TILES;
    for (int64_t o = 0; o < stride; o += PANEL) {
      for (int64_t c = 0; c < n; c += ROWS) {
        const int64_t rows = n - c < ROWS ? n - c : ROWS;
        const float *x = source.data + row * n + c, *g = gradient.data + row * m + o;
        float* to = sums + c * stride + o;
        if (o + PANEL <= stride) accumulate_some<ROWS, 2>(rows, x, n, g, m, depth, to, stride);
        else accumulate_some<ROWS, 1>(rows, x, n, g, m, depth, to, stride);
      }
    }
  }
}

void finish_gradient(const float* sums, int64_t plane, int64_t outputs, float* dw, int64_t output_stride) {
  for (int64_t o = 0; o < outputs; o += LANES) {
    Lane half[18], w[3];
    for (int k = 0; k < 6; ++k) {
      Lane m[6];
      for (int a = 0; a < 6; ++a) m[a] = load<LANES>(sums + (6 * a + k) * plane + o);
      times_gt(m, half + k, 1, 6);
    }
    for (int a = 0; a < 3; ++a) {
      times_gt(half + 6 * a, w, 1, 1);
      for (int64_t l = 0; l < LANES && o + l < outputs; ++l)
        for (int k = 0; k < 3; ++k) dw[(o + l) * output_stride + 3 * a + k] = w[k][l];
    }
  }
}

}  // namespace

extern const Winograd WINOGRAD = {
    LANES, transform, transform_gradient, pack, convolve, correlate, finish_gradient};

}  // namespace thresholdnet
