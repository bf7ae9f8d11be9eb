// The launchers of passes.h as a Device of ../operators.h. A Place is where they run: made from an operator's name and
// a tensor, it makes that tensor's device the current one as long as it lives, and has its stream().
#pragma once
#include "../operators.h"
#include "passes.h"

namespace thresholdnet {

template <class Place>
class Launched {
 public:
  static constexpr bool HALF = true;

  Launched(const char* op, const Tensor& like) : op_(op), like_(like), place_(op, like) {}

  template <class E, class A>
  void gather(const std::vector<Part<E>>& parts, int64_t channels, Range<A> act, Rows<E> out, int64_t rows) const {
    fits(channels);
    const A *scale = parts.empty() ? nullptr : parts[0].scale, *shift = parts.empty() ? nullptr : parts[0].shift;
    check(pixels::gather(parts.data(), parts.size(), scale, shift, act, out, rows, place_.stream()));
  }

  template <class E, class A>
  void moments(Rows<const E> z, int64_t channels, int64_t rows, A* found) const {
    const Tensor partial = workspace(channels, rows);
    check(pixels::moments(z, channels, rows, static_cast<A*>(partial.data_ptr()), found, place_.stream()));
  }

  template <class E, class A>
  void mask_sums(
      Rows<const E> g, Rows<const E> add, Rows<const E> z, int64_t channels, Norm<A> norm, Range<A> act, Rows<E> out,
      int64_t rows, A* sums) const {
    const Tensor partial = workspace(channels, rows);
    auto* tiles = static_cast<A*>(partial.data_ptr());
    check(pixels::mask_sums(g, add, z, channels, norm, act, out, rows, tiles, sums, place_.stream()));
  }

  template <class E, class A>
  void send(
      Rows<const E> g, const std::vector<Part<E>>& parts, Norm<A> norm, Range<A> act, int64_t total, int64_t rows,
      A* sums) const {
    const Tensor partial = workspace(total, rows);
    auto* tiles = static_cast<A*>(partial.data_ptr());
    check(pixels::send(g, parts.data(), parts.size(), norm, act, total, rows, tiles, sums, place_.stream()));
  }

  template <class E, class A>
  void linear(
      Rows<const E> g, Rows<const E> z, int64_t channels, const A* a, const A* b, const A* c, const A* mean,
      Rows<E> out, int64_t rows) const {
    fits(channels);
    check(pixels::linear(g, z, channels, a, b, c, mean, out, rows, place_.stream()));
  }

  template <class E, class A>
  void batch_norm_vectors(
      const E* gamma, const E* beta, const A* mean, const A* variance, A eps, A pixels, int64_t channels,
      A* made) const {
    if (channels) {
      check(pixels::batch_norm_vectors(gamma, beta, mean, variance, eps, pixels, channels, made, place_.stream()));
    }
  }

  template <class E>
  void max_pool(const E* x, E* out, const Pool& pool, int64_t images) const {
    check(pixels::max_pool(x, out, pool, images, place_.stream()));
  }

  template <class E>
  void max_pool_backward(const E* grad, const E* x, E* out, const Pool& pool, int64_t images) const {
    check(pixels::max_pool_backward(grad, x, out, pool, images, place_.stream()));
  }

  template <class E, class A>
  void avg_pool(
      const E* x, const A* scale, const A* shift, Range<A> act, E* out, const Pool& pool, int64_t images) const {
    fits(pool.channels);
    check(pixels::avg_pool(x, scale, shift, act, out, pool, images, place_.stream()));
  }

  template <class E, class A>
  void spread_mask_sums(
      const E* grad, const E* z, Norm<A> norm, Range<A> act, E* out, const Pool& pool, int64_t images, A* sums) const {
    const Tensor partial = workspace(pool.channels, images * pool.height * pool.width);
    auto* tiles = static_cast<A*>(partial.data_ptr());
    check(pixels::spread_mask_sums(grad, z, norm, act, out, pool, images, tiles, sums, place_.stream()));
  }

 private:
  void check(const char* problem) const {
    if (problem) refuse(op_, ": it could not be launched: ", problem);
  }

  void fits(int64_t channels) const {
    if (channels > std::numeric_limits<int32_t>::max()) refuse(op_, ": more than 2^31 - 1 channels, got ", channels);
  }

  // For the tiles' sums. The allocator hands it to later work of the same stream alone.
  Tensor workspace(int64_t channels, int64_t rows) const {
    fits(channels);
    return torch::stable::new_empty(like_, {pixels::tiles(rows), 2, channels}, wide_type(like_));
  }

  const char* op_;
  const Tensor& like_;
  Place place_;
};

}  // namespace thresholdnet
