// The loops of rows.h. Included once per instruction set with TABLE and NAME defined; everything else is local to the
// file and no function of the standard library is instantiated, so that no object lends another its instructions.
//
// Channels are walked in GCC's vector types of VECTOR bytes, which the file that includes this defines as what its
// instructions have: GCC takes comparisons of longer vectors apart into scalars. Rows are finished one after the other,
// because walks that jump from row to row defeat prefetching and write combining: four rows of three tensors at once
// took twice as long from memory. Sums live in the first-level cache. Of `moments`, which reads one tensor and writes
// none, AT_ONCE rows go together, so that a sum is loaded and stored once for all of them.
#include <cstring>

#include "rows.h"

namespace thresholdnet {
namespace {

constexpr int AT_ONCE = 4;

template <class T, int W>
struct VecOf {
  typedef T type __attribute__((vector_size(W * sizeof(T))));
};
template <class T, int W>
using Vec = typename VecOf<T, W>::type;

template <int W>
struct Width {
  static constexpr int value = W;
};

#define INLINE inline __attribute__((always_inline))

// Calls f(c, width) for all channels: VECTOR bytes of A at a time, then half of it, and so on down to one channel.
template <class A, int W = VECTOR / sizeof(A), class F>
INLINE void lanes(int64_t channels, const F& f, int64_t c = 0) {
  for (; c + W <= channels; c += W) f(c, Width<W>());
  if constexpr (W > 1) {
    if (c < channels) lanes<A, W / 2>(channels, f, c);
  }
}

template <int W>
INLINE Vec<float, W> load(const float* p) {
  Vec<float, W> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <int W>
INLINE Vec<double, W> load(const double* p) {
  Vec<double, W> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <int W>
INLINE Vec<uint16_t, W> load_bits(const bfloat16* p) {
  Vec<uint16_t, W> half;
  std::memcpy(&half, p, sizeof(half));
  return half;
}

template <int W>
INLINE Vec<uint32_t, W> widened(Vec<uint16_t, W> half) {
#if VECTOR == 64  // GCC takes the conversion apart
  if constexpr (W == 16) return (Vec<uint32_t, W>)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)half);
#endif
  return __builtin_convertvector(half, Vec<uint32_t, W>);
}

template <int W>
INLINE Vec<float, W> load(const bfloat16* p) {
  return (Vec<float, W>)(widened<W>(load_bits<W>(p)) << 16);
}

template <int W>
INLINE void store(float* p, Vec<float, W> v) {
  std::memcpy(p, &v, sizeof(v));
}

template <int W>
INLINE void store(double* p, Vec<double, W> v) {
  std::memcpy(p, &v, sizeof(v));
}

// The bits of bfloat16 values: rounded to nearest, ties to even; NaN stays NaN.
template <int W>
INLINE Vec<uint16_t, W> rounded(Vec<float, W> v) {
#if defined(HAS_BF16)  // which has zeros for values below 2^-126
  Vec<float, (W < 4 ? 4 : W)> wide = {};
  std::memcpy(&wide, &v, sizeof(v));
  Vec<uint16_t, W> half;
  if constexpr (W == 16) {
    const auto found = _mm512_cvtneps_pbh((__m512)wide);
    std::memcpy(&half, &found, sizeof(half));
  } else if constexpr (W == 8) {
    const auto found = _mm256_cvtneps_pbh((__m256)wide);
    std::memcpy(&half, &found, sizeof(half));
  } else {
    const auto found = _mm_cvtneps_pbh((__m128)wide);
    std::memcpy(&half, &found, sizeof(half));
  }
  return half;
#else
  const auto bits = (Vec<uint32_t, W>)v;
  const auto near = bits + 0x7fffu + ((bits >> 16) & 1u);
  const auto kept = (Vec<uint32_t, W>)(v == v ? (Vec<int32_t, W>)near : (Vec<int32_t, W>)(bits | 0x400000u));
  return __builtin_convertvector(kept >> 16, Vec<uint16_t, W>);
#endif
}

template <int W>
INLINE void store(bfloat16* p, Vec<float, W> v) {
  const auto half = rounded<W>(v);
  std::memcpy(p, &half, sizeof(half));
}

template <class V, class A>
INLINE V clamp(V v, Range<A> act) {  // NaN stays NaN
  const V low = V{} + act.low, high = V{} + act.high;
  const V raised = v < low ? (act.slope == 0 ? low : v * act.slope) : v;
  return raised > high ? high : raised;
}

template <class V, class A>
INLINE V masked(V g, V v, Range<A> act) {
  return ((v > act.low) & (v < act.high)) ? g : act.slope == 0 ? V{} : g * act.slope;
}

template <class E>
void gather(
    const Part<E>* parts, int64_t count, Range<typename Wide<E>::type> act, Rows<E> out, int64_t first, int64_t last) {
  using A = typename Wide<E>::type;
  for (int64_t r = first; r < last; ++r) {
    E* to = out.data + r * out.stride;
    for (int64_t j = 0; j < count; ++j) {
      const Part<E>& part = parts[j];
      const E* from = part.in.data + r * part.in.stride;
      if (part.scale) {
        lanes<A>(part.channels, [&](int64_t c, auto width) {
          constexpr int W = decltype(width)::value;
          store<W>(to + c, clamp(load<W>(from + c) * load<W>(part.scale + c) + load<W>(part.shift + c), act));
        });
      } else {
        lanes<E>(part.channels, [&](int64_t c, auto width) {
          std::memcpy(to + c, from + c, decltype(width)::value * sizeof(E));
        });
      }
      to += part.channels;
    }
  }
}

// Calls f(row, count) for the rows [first, last), AT_ONCE at a time where count is AT_ONCE() and then one by one.
template <class F>
INLINE void row_groups(int64_t first, int64_t last, const F& f) {
  int64_t r = first;
  for (; r + AT_ONCE <= last; r += AT_ONCE) f(r, Width<AT_ONCE>());
  for (; r < last; ++r) f(r, Width<1>());
}

template <class E>
void moments(Rows<const E> z, int64_t channels, typename Wide<E>::type* found, int64_t first, int64_t last) {
  using A = typename Wide<E>::type;
  A *means = found, *squares = found + channels;
  std::memset(found, 0, 2 * channels * sizeof(A));
  row_groups(first, last, [&](int64_t r, auto count) {
    lanes<A>(channels, [&](int64_t c, auto width) {
      constexpr int W = decltype(width)::value;
      auto sum = load<W>(means + c);
      for (int i = 0; i < decltype(count)::value; ++i) sum += load<W>(z.data + (r + i) * z.stride + c);
      store<W>(means + c, sum);
    });
  });
  for (int64_t c = 0; c < channels; ++c) means[c] /= (A)(last - first);
  row_groups(first, last, [&](int64_t r, auto count) {  // from the cache
    lanes<A>(channels, [&](int64_t c, auto width) {
      constexpr int W = decltype(width)::value;
      const auto mean = load<W>(means + c);
      auto square = load<W>(squares + c);
      for (int i = 0; i < decltype(count)::value; ++i) {
        const auto d = load<W>(z.data + (r + i) * z.stride + c) - mean;
        square += d * d;
      }
      store<W>(squares + c, square);
    });
  });
}

template <class E>
void mask_sums(
    Rows<const E> g, Rows<const E> add, Rows<const E> z, int64_t channels, Norm<typename Wide<E>::type> norm,
    Range<typename Wide<E>::type> act, Rows<E> out, typename Wide<E>::type* sums, int64_t first, int64_t last) {
  using A = typename Wide<E>::type;
  A* products = sums + channels;
  std::memset(sums, 0, 2 * channels * sizeof(A));
  for (int64_t r = first; r < last; ++r) {
    lanes<A>(channels, [&](int64_t c, auto width) {
      constexpr int W = decltype(width)::value;
      const auto scale = load<W>(norm.scale + c), shift = load<W>(norm.shift + c), mean = load<W>(norm.mean + c);
      const auto x = load<W>(z.data + r * z.stride + c);
      auto v = load<W>(g.data + r * g.stride + c);
      if (add.data) v += load<W>(add.data + r * add.stride + c);
      v = masked(v, x * scale + shift, act);
      store<W>(sums + c, load<W>(sums + c) + v);
      store<W>(products + c, load<W>(products + c) + v * (x - mean));
      store<W>(out.data + r * out.stride + c, v);
    });
  }
  for (int64_t c = 0; c < channels; ++c) products[c] *= norm.rstd[c];
}

template <class E>
void send(
    Rows<const E> g, const Part<E>* parts, int64_t count, Norm<typename Wide<E>::type> norm,
    Range<typename Wide<E>::type> act, typename Wide<E>::type* sums, int64_t total, int64_t first, int64_t last) {
  using A = typename Wide<E>::type;
  A* products = sums + total;
  std::memset(sums, 0, 2 * total * sizeof(A));
  for (int64_t r = first; r < last; ++r) {
    int64_t start = 0;
    for (int64_t j = 0; j < count; ++j) {
      const Part<E>& part = parts[j];
      lanes<A>(part.channels, [&](int64_t c, auto width) {
        constexpr int W = decltype(width)::value;
        const int64_t k = start + c;
        const auto scale = load<W>(norm.scale + k), shift = load<W>(norm.shift + k), mean = load<W>(norm.mean + k);
        const auto x = load<W>(part.in.data + r * part.in.stride + c);
        const auto v = masked(load<W>(g.data + r * g.stride + k), x * scale + shift, act);
        store<W>(sums + k, load<W>(sums + k) + v);
        store<W>(products + k, load<W>(products + k) + v * (x - mean));
        auto sent = scale * v;
        if (part.before.data) sent += load<W>(part.before.data + r * part.before.stride + c);
        store<W>(part.out.data + r * part.out.stride + c, sent);
      });
      start += part.channels;
    }
  }
  for (int64_t k = 0; k < total; ++k) products[k] *= norm.rstd[k];
}

template <class E>
void linear(
    Rows<const E> g, Rows<const E> z, int64_t channels, const typename Wide<E>::type* a,
    const typename Wide<E>::type* b, const typename Wide<E>::type* c, const typename Wide<E>::type* mean, Rows<E> out,
    int64_t first, int64_t last) {
  using A = typename Wide<E>::type;
  for (int64_t r = first; r < last; ++r) {
    lanes<A>(channels, [&](int64_t k, auto width) {
      constexpr int W = decltype(width)::value;
      const auto raw = load<W>(z.data + r * z.stride + k);
      const auto rest = (mean ? raw - load<W>(mean + k) : raw) * load<W>(b + k) + load<W>(c + k);
      const auto v = load<W>(g.data + r * g.stride + k);
      store<W>(out.data + r * out.stride + k, a ? v * load<W>(a + k) + rest : v + rest);
    });
  }
}

struct Span {  // a window clipped to the image, on one axis
  int64_t first, last;
};

INLINE Span window(int64_t at, int64_t size, const Pool& pool) {
  const int64_t start = at * pool.stride - pool.padding, end = start + pool.kernel;
  return {start < 0 ? 0 : start, end < size ? end : size};
}

// Positions inside a window: integers of A's size, since float has no numbers for those from 2^24 on.
template <class A, int W>
using Places = decltype(Vec<A, W>{} > Vec<A, W>{});

// The maximum of a window and its position in row-major order: the first of equals, the last NaN, as torch has it.
template <int W, class E>
INLINE void maximum(
    const E* x, const Pool& pool, Span rows, Span columns, Vec<typename Wide<E>::type, W>& best,
    Places<typename Wide<E>::type, W>& place) {
  using A = typename Wide<E>::type;
  best = load<W>(x + (rows.first * pool.width + columns.first) * pool.channels);
  place = Places<A, W>{};
  int32_t position = 0;
  for (int64_t y = rows.first; y < rows.last; ++y) {
    for (int64_t at = columns.first; at < columns.last; ++at, position += 1) {
      const auto v = load<W>(x + (y * pool.width + at) * pool.channels);
      const auto better = (v > best) | (v != v);
      best = better ? v : best;
      place = better ? Places<A, W>{} + position : place;
    }
  }
}

template <class E>
void max_pool(const E* x, E* out, Pool pool, int64_t first, int64_t last) {
  using A = typename Wide<E>::type;
  for (int64_t y = first; y < last; ++y) {
    const Span rows = window(y, pool.height, pool);
    for (int64_t at = 0; at < pool.out_width; ++at) {
      const Span columns = window(at, pool.width, pool);
      E* to = out + (y * pool.out_width + at) * pool.channels;
      lanes<A>(pool.channels, [&](int64_t c, auto width) {
        constexpr int W = decltype(width)::value;
        Vec<A, W> best;
        Places<A, W> place;
        maximum<W>(x + c, pool, rows, columns, best, place);
        store<W>(to + c, best);
      });
    }
  }
}

template <class E>
void max_pool_backward(const E* grad, const E* x, E* out, Pool pool, int64_t first, int64_t last) {
  using A = typename Wide<E>::type;
  std::memset((void*)(out + first * pool.width * pool.channels), 0, (last - first) * pool.width * pool.channels * sizeof(E));
  // the windows that touch these rows: y * stride - padding + kernel > first and y * stride - padding < last
  const int64_t reach = first + pool.padding - pool.kernel + 1;
  const int64_t from = reach <= 0 ? 0 : (reach + pool.stride - 1) / pool.stride;
  const int64_t beyond = (last - 1 + pool.padding) / pool.stride + 1;
  const int64_t to = beyond < pool.out_height ? beyond : pool.out_height;
  for (int64_t y = from; y < to; ++y) {
    const Span rows = window(y, pool.height, pool);
    for (int64_t at = 0; at < pool.out_width; ++at) {
      const Span columns = window(at, pool.width, pool);
      const E* arriving = grad + (y * pool.out_width + at) * pool.channels;
      lanes<A>(pool.channels, [&](int64_t c, auto width) {
        constexpr int W = decltype(width)::value;
        Vec<A, W> best;
        Places<A, W> place;
        maximum<W>(x + c, pool, rows, columns, best, place);
        const auto g = load<W>(arriving + c);
        int32_t position = 0;
        for (int64_t row = rows.first; row < rows.last; ++row) {
          for (int64_t column = columns.first; column < columns.last; ++column, position += 1) {
            if (row < first || row >= last) continue;
            E* target = out + (row * pool.width + column) * pool.channels + c;
            store<W>(target, load<W>(target) + (place == position ? g : Vec<A, W>{}));
          }
        }
      });
    }
  }
}

template <class E>
constexpr Kernels<E> kernels() {
  return {gather<E>, moments<E>, mask_sums<E>, send<E>, linear<E>, max_pool<E>, max_pool_backward<E>};
}

}  // namespace

extern const Table TABLE = {NAME, kernels<float>(), kernels<double>(), kernels<bfloat16>()};

}  // namespace thresholdnet
