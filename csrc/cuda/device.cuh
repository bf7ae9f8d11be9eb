// Everything by which a kernel touches the device. nvcc gets instructions, and a C++ compiler (THRESHOLDNET_EMULATED)
// csrc/emulator's versions, which check alignment and barriers: kernels are the same source in both worlds.
//
// A kernel uses the names below, threadIdx.x, blockIdx.x, __syncthreads and __syncwarp; warp operations take all lanes.
//
//   SHARED_ARRAY(float, name, [2][64])    a shared array of constant size
//   SHARED_MEMORY(name)                   unsigned char*: the dynamic shared memory, 128 bytes aligned
//   load_aligned<T>(p), store_aligned(p, v)  one access of sizeof(T) bytes; p must be a multiple of alignof(T)
//   load_pack<W>(p), store_pack(p, pack)  W elements, one access
//   widen(e), narrow<E>(a)                element to float (double to double) and back, to nearest even
//   unpack2, pack2, unpack8, pack8 <E>    the same for 2 half-precision elements in 32 bits, 8 in a uint4
//   copy16(shared, global, valid)         asynchronous 16 bytes (zeros where not valid), both 16 bytes aligned
//   commit_copies(), wait_for_copies<N>() close a group of copies; wait until at most N groups are in flight
//   shuffle_xor(value, mask)              value of the lane at (lane ^ mask)
//   load_matrix(to, row)                  ldmatrix.x4: lane l has the address of row l % 8 of matrix l / 8
//   mma<E>(acc, a, b)                     m16n8k16, row.col, fp32 accumulators
//   launch(kernel, blocks, threads, shared_bytes, stream, arguments...)   null, or the problem in words
#pragma once
#include <cstdint>

#include "../types.h"

namespace thresholdnet {

using bf16 = bfloat16;
using fp16 = float16;

// What CUDA's own message would not say clearly.
inline const char* launch_problem(int64_t blocks, int threads) {
  if (blocks < 1 || blocks > INT32_MAX) return "a launch takes 1 to 2^31 - 1 blocks";
  if (threads < 1 || threads > 1024) return "a block takes 1 to 1024 threads";
  return nullptr;
}

}  // namespace thresholdnet

#ifdef THRESHOLDNET_EMULATED
#include "../emulator/device.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SHARED_ARRAY(type, name, extents) __shared__ type name extents
#define SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]

namespace thresholdnet {

template <class T>
__device__ __forceinline__ T load_aligned(const void* from) {
  return *static_cast<const T*>(from);
}

template <class T>
__device__ __forceinline__ void store_aligned(void* to, const T& value) {
  *static_cast<T*>(to) = value;
}

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(bfloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float widen(float16 value) { return __half2float(__ushort_as_half(value.bits)); }

template <class E>
__device__ E narrow(typename Wide<E>::type value);
template <>
__device__ __forceinline__ float narrow<float>(float value) { return value; }
template <>
__device__ __forceinline__ double narrow<double>(double value) { return value; }
template <>
__device__ __forceinline__ bfloat16 narrow<bfloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
__device__ __forceinline__ float16 narrow<float16>(float value) { return {__half_as_ushort(__float2half_rn(value))}; }

template <class E>
__device__ float2 unpack2(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack2<bfloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 unpack2<float16>(uint32_t pair) {
  return make_float2(widen(float16{static_cast<uint16_t>(pair)}), widen(float16{static_cast<uint16_t>(pair >> 16)}));
}

template <class E>
__device__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<bfloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t pack2<float16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Through L1 (.ca): neighbours read the same pixels again.
__device__ __forceinline__ void copy16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

__device__ __forceinline__ void load_matrix(uint32_t* to, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

template <class E>
__device__ void mma(float* acc, const uint32_t* a, const uint32_t* b);
#define MMA(type)                                                                                  \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                      \
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                    \
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
template <>
__device__ __forceinline__ void mma<bfloat16>(float* acc, const uint32_t* a, const uint32_t* b) { MMA("bf16"); }
template <>
__device__ __forceinline__ void mma<float16>(float* acc, const uint32_t* a, const uint32_t* b) { MMA("f16"); }
#undef MMA

template <class... Parameters, class... Arguments>
const char* launch(
    void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, void* stream,
    const Arguments&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "CUDA passes at most 4 KiB of arguments");
  if (const char* problem = launch_problem(blocks, threads)) return problem;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {  // what a kernel may take without asking
    const auto which = reinterpret_cast<const void*>(kernel);
    error = cudaFuncSetAttribute(
        which, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace thresholdnet
#endif

namespace thresholdnet {

template <class E, int W>
struct alignas(sizeof(E) * W) Pack {
  E at[W];
};

template <int W, class E>
__device__ __forceinline__ Pack<E, W> load_pack(const E* from) {
  return load_aligned<Pack<E, W>>(from);
}

template <class E, int W>
__device__ __forceinline__ void store_pack(E* to, const Pack<E, W>& pack) {
  store_aligned(to, pack);
}

template <class E>
__device__ __forceinline__ void unpack8(float (&values)[8], uint4 packed) {
  const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack2<E>(pairs[i]);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

template <class E>
__device__ __forceinline__ uint4 pack8(const float (&values)[8]) {
  return make_uint4(
      pack2<E>(values[0], values[1]), pack2<E>(values[2], values[3]), pack2<E>(values[4], values[5]),
      pack2<E>(values[6], values[7]));
}

// Activations; NaN stays NaN.
template <class A>
__device__ __forceinline__ A activate(A value, Range<A> act) {
  value = value < act.low ? (act.slope == 0 ? act.low : value * act.slope) : value;
  return value > act.high ? act.high : value;
}

// The gradient in front of an activation of `value`, from that behind it.
template <class A>
__device__ __forceinline__ A behind_activation(A gradient, A value, Range<A> act) {
  return value > act.low && value < act.high ? gradient : act.slope == 0 ? A(0) : gradient * act.slope;
}

}  // namespace thresholdnet
