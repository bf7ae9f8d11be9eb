// The loops for x86-64-v3. The pragma holds to the end of the file, where templates are instantiated.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define TABLE avx2_table
#define NAME "avx2"
#define VECTOR 32
#include "rows.inl"
#include "products.inl"
#define WINOGRAD avx2_winograd
#include "winograd.inl"
#define WEIGHT_GRADIENTS avx2_weight_gradients
#include "weight_gradient.inl"
#define CONVOLUTIONS avx2_convolutions
#include "few_pixels.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
