// Sums of outer products in registers, for the loops of winograd.inl and weight_gradient.inl. Included behind rows.inl.
//
// R <= ROWS scalars times V vectors. ROWS times two vectors are 12 sums, enough to hide the latency of two multiply-adds a
// cycle, and with two vectors and one scalar they fit 16 registers.

namespace thresholdnet {
namespace {

constexpr int64_t ROWS = 6;

template <class A>
constexpr int LANES_OF = VECTOR / sizeof(A);

template <int R, int V, class A>
struct Sums {
  Vec<A, LANES_OF<A>> of[R][V];
};

template <int R, int V, class A>
INLINE void load_sums(Sums<R, V, A>& sums, const A* from, int64_t stride) {
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums.of[r][v] = load<LANES_OF<A>>(from + r * stride + v * LANES_OF<A>);
  }
}

template <int R, int V, class A>
INLINE void store_sums(const Sums<R, V, A>& sums, A* to, int64_t stride) {
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store<LANES_OF<A>>(to + r * stride + v * LANES_OF<A>, sums.of[r][v]);
  }
}

// sums += scalars, so many elements apart, x vectors.
template <int R, int V, class A>
INLINE void add_product(Sums<R, V, A>& sums, const A* scalars, int64_t apart, const A* vectors) {
  Vec<A, LANES_OF<A>> value[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) value[v] = load<LANES_OF<A>>(vectors + v * LANES_OF<A>);
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums.of[r][v] += scalars[r * apart] * value[v];
  }
}

// The same of `count` pairs, each of them so many elements behind the one before; scalars lie side by side.
template <int R, int V, class A>
INLINE void add_products(
    Sums<R, V, A>& sums, const A* scalars, int64_t scalar_step, const A* vectors, int64_t vector_step, int64_t count) {
  for (int64_t p = 0; p < count; ++p, scalars += scalar_step, vectors += vector_step)
    add_product(sums, scalars, 1, vectors);
}

}  // namespace
}  // namespace thresholdnet
