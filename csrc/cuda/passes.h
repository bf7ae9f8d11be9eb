// Launchers of the passes over pixels that ../ops.cpp describes; no torch and no CUDA in here. Each returns null, or
// what went wrong. E is float, double, bfloat16 or float16; `rows` are pixels.
//
// Sums go through partial[tiles(rows), 2, channels] in device memory: a tile of rows leaves its own, and they are
// merged in the order of their tiles, so a result does not depend on what ran when.
#pragma once
#include <cstdint>

#include "../types.h"

namespace thresholdnet::pixels {

template <class E>
using Vector = const typename Wide<E>::type*;

template <class E>
using Vectors = Norm<typename Wide<E>::type>;

template <class E>
using Activation = Range<typename Wide<E>::type>;

template <class E>
using Sums = typename Wide<E>::type*;

int64_t tiles(int64_t rows);

// scale and shift over all channels, null: a copy; parts: channels and in.
template <class E>
const char* gather(
    const Part<E>* parts, int64_t count, Vector<E> scale, Vector<E> shift, Activation<E> act, Rows<E> out, int64_t rows,
    void* stream);

template <class E>
const char* moments(
    Rows<const E> z, int64_t channels, int64_t rows, Sums<E> partial, Sums<E> found, void* stream);

// add.data may be null.
template <class E>
const char* mask_sums(
    Rows<const E> g, Rows<const E> add, Rows<const E> z, int64_t channels, Vectors<E> norm, Activation<E> act,
    Rows<E> out, int64_t rows, Sums<E> partial, Sums<E> sums, void* stream);

// parts: channels, in, out, and before, which may be null.
template <class E>
const char* send(
    Rows<const E> g, const Part<E>* parts, int64_t count, Vectors<E> norm, Activation<E> act, int64_t total,
    int64_t rows, Sums<E> partial, Sums<E> sums, void* stream);

// a may be null: 1; mean, too: 0.
template <class E>
const char* linear(
    Rows<const E> g, Rows<const E> z, int64_t channels, Vector<E> a, Vector<E> b, Vector<E> c, Vector<E> mean,
    Rows<E> out, int64_t rows, void* stream);

// See ../ops.cpp; vectors, not pixels.
template <class E>
const char* batch_norm_vectors(
    const E* gamma, const E* beta, Vector<E> mean, Vector<E> variance, typename Wide<E>::type eps,
    typename Wide<E>::type pixels, int64_t channels, Sums<E> made, void* stream);

template <class E>
const char* max_pool(const E* x, E* out, const Pool& pool, int64_t images, void* stream);

template <class E>
const char* max_pool_backward(const E* grad, const E* x, E* out, const Pool& pool, int64_t images, void* stream);

// Windows side by side: pool.stride is pool.kernel, pool.padding 0. scale and shift null: averages of x itself.
template <class E>
const char* avg_pool(
    const E* x, Vector<E> scale, Vector<E> shift, Activation<E> act, E* out, const Pool& pool, int64_t images,
    void* stream);

// mask_sums of the gradient that averages send to z, which is nowhere stored: grad / kernel^2, 0 outside the windows.
template <class E>
const char* spread_mask_sums(
    const E* grad, const E* z, Vectors<E> norm, Activation<E> act, E* out, const Pool& pool, int64_t images,
    Sums<E> partial, Sums<E> sums, void* stream);

}  // namespace thresholdnet::pixels
