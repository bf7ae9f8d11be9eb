// The loops for x86-64-v4. The pragma holds to the end of the file, where templates are instantiated.
#if defined(__x86_64__)
#include <immintrin.h>  // in front of the pragma: its functions have targets of their own

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define TABLE avx512_table
#define NAME "avx512"
#define VECTOR 64
#include "rows.inl"
#include "products.inl"
#define WINOGRAD avx512_winograd
#include "winograd.inl"
#define WEIGHT_GRADIENTS avx512_weight_gradients
#include "weight_gradient.inl"
#define CONVOLUTIONS avx512_convolutions
#include "few_pixels.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
