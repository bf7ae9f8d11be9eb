// What cuda/device.cuh gives to kernels, on a CPU. Included by it alone; see there for what each does.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../types.h"
#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

#define SHARED_ARRAY(type, name, extents)                                            \
  static const char name##_place = 0;                                                \
  using name##_type = type extents;                                                  \
  name##_type& name = *static_cast<name##_type*>(emulator::shared_array(&name##_place, sizeof(name##_type)))
#define SHARED_MEMORY(name) unsigned char* name = emulator::dynamic_shared()

using emulator::blockDim;
using emulator::blockIdx;
using emulator::gridDim;
using emulator::threadIdx;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline void __syncthreads() { emulator::barrier(); }
inline void __syncwarp() { emulator::exchange("__syncwarp", nullptr, 0); }

namespace thresholdnet {

template <class To, class From>
inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T>
inline T load_aligned(const void* from) {
  emulator::check_aligned("load", from, alignof(T));
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <class T>
inline void store_aligned(void* to, const T& value) {
  emulator::check_aligned("store", to, alignof(T));
  std::memcpy(to, &value, sizeof(T));
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(bfloat16 value) { return same_bits<float>(static_cast<uint32_t>(value.bits) << 16); }
inline float widen(float16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 31, fraction = value.bits & 0x3ff;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(fraction), -24);
  if (exponent == 31) return same_bits<float>(sign | 0x7f800000u | fraction << 13);
  return same_bits<float>(sign | (exponent + 112) << 23 | fraction << 13);
}

template <class E>
E narrow(typename Wide<E>::type value);
template <>
inline float narrow<float>(float value) { return value; }
template <>
inline double narrow<double>(double value) { return value; }
template <>
inline bfloat16 narrow<bfloat16>(float value) {
  const auto bits = same_bits<uint32_t>(value);
  if (value != value) return {0x7fff};  // the GPU's NaN
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline float16 narrow<float16>(float value) {
  const auto bits = same_bits<uint32_t>(value), size = bits & 0x7fffffffu;
  const auto made = [&](uint32_t magnitude) {
    return float16{static_cast<uint16_t>((bits >> 16 & 0x8000) | magnitude)};
  };
  if (size > 0x7f800000u) return {0x7fff};  // the GPU's NaN
  if (size >= 0x477ff000u) return made(0x7c00);  // 65520 and more round to infinity
  if (size < 0x38800000u)  // below 2^-14: a multiple of 2^-24, as floats from 0.5 to 1 are
    return made(same_bits<uint32_t>(same_bits<float>(size) + 0.5f) - same_bits<uint32_t>(0.5f));
  return made((size + 0xfff + (size >> 13 & 1) - 0x38000000u) >> 13);
}

template <class E>
inline float2 unpack2(uint32_t pair) {
  return {widen(E{static_cast<uint16_t>(pair)}), widen(E{static_cast<uint16_t>(pair >> 16)})};
}
template <class E>
inline uint32_t pack2(float low, float high) {
  return narrow<E>(low).bits | static_cast<uint32_t>(narrow<E>(high).bits) << 16;
}

inline void copy16(void* shared, const void* global, bool valid) { emulator::copy_later(shared, global, valid); }
inline void commit_copies() { emulator::commit_copies(); }
template <int GROUPS>
inline void wait_for_copies() {
  emulator::wait_for_copies(GROUPS);
}

template <class T>
inline T shuffle_xor(T value, int mask) {
  const unsigned lane = (threadIdx.x % 32) ^ mask;
  const emulator::Round& round = emulator::exchange("shuffle_xor", &value, sizeof(T));
  T found;
  std::memcpy(&found, round.brought[lane], sizeof(T));
  return found;
}

inline void load_matrix(uint32_t* to, const void* row) {
  emulator::check_aligned("ldmatrix row", row, 16);
  if (!emulator::is_shared(row, 16)) emulator::fail("ldmatrix must read shared memory, got %p", row);
  const unsigned lane = threadIdx.x % 32;
  const emulator::Round& round = emulator::exchange("ldmatrix", &row, sizeof(row));
  for (int i = 0; i < 4; ++i) {
    const char* from;
    std::memcpy(&from, round.brought[i * 8 + lane / 4], sizeof(from));
    std::memcpy(to + i, from + lane % 4 * 4, 4);
  }
}

// Fragments of m16n8k16: lane l holds rows l/4 and l/4 + 8 of A and column l/4 of B, k 2(l%4), +1, +8, +9.
template <class E>
inline void mma(float* acc, const uint32_t* a, const uint32_t* b) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const unsigned lane = threadIdx.x % 32;
  const emulator::Round& round = emulator::exchange("mma", mine, sizeof(mine), [](emulator::Round& all) {
    float left[16][16], right[16][8];
    for (int l = 0; l < 32; ++l) {
      uint32_t brought[6];
      std::memcpy(brought, all.brought[l], sizeof(brought));
      for (int q = 0; q < 6; ++q) {
        const float2 pair = unpack2<E>(brought[q]);
        const int k = l % 4 * 2 + (q < 4 ? q / 2 : q - 4) * 8, at = l / 4 + (q < 4 ? q % 2 * 8 : 0);
        (q < 4 ? left[at][k] : right[k][at]) = pair.x;
        (q < 4 ? left[at][k + 1] : right[k + 1][at]) = pair.y;
      }
    }
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 8; ++n) {
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += left[m][k] * right[k][n];
        all.result[m * 8 + n] = sum;
      }
    }
  });
  for (int i = 0; i < 4; ++i) acc[i] += round.result[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2];
}

template <class... Parameters, class... Arguments>
const char* launch(
    void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, void*,
    const Arguments&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "CUDA passes at most 4 KiB of arguments");
  if (const char* problem = launch_problem(blocks, threads)) return problem;
  emulator::run([&] { kernel(arguments...); }, blocks, threads, static_cast<size_t>(shared_bytes));
  return nullptr;
}

}  // namespace thresholdnet
