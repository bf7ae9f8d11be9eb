// The loops for x86-64-v4 with AVX512-BF16, which rounds to bfloat16 and multiplies pairs of them. The pragma holds to
// the end of the file, where templates are instantiated.
#if defined(__x86_64__)
#include <immintrin.h>  // in front of the pragma: its functions have targets of their own

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif
#define TABLE avx512_bf16_table
#define NAME "avx512_bf16"
#define VECTOR 64
#define HAS_BF16
#include "rows.inl"
#include "products.inl"
#define WEIGHT_GRADIENTS avx512_bf16_weight_gradients
#include "weight_gradient.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
