// What the emulator must refuse, and two checks of its primitives; test_emulator.py runs one by name.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/cuda/device.cuh"

using namespace thresholdnet;

namespace {

__global__ void misaligned_load(const float* x) { load_aligned<uint4>(x + 1); }
__global__ void misaligned_store(float* x) { store_aligned(x + 2, make_uint4(0, 0, 0, 0)); }
__global__ void misaligned_pack(const float* x) { load_pack<2>(x + 3); }

__global__ void misaligned_copy(const float* x) {
  SHARED_MEMORY(shared);
  copy16(shared, x + 1, true);
}

__global__ void misaligned_copy_target(const float* x) {
  SHARED_MEMORY(shared);
  copy16(shared + 8, x, true);
}

__global__ void misaligned_matrix() {
  SHARED_MEMORY(shared);
  uint32_t to[4];
  load_matrix(to, shared + threadIdx.x * 16 + 4);
}

__global__ void copy_to_global(float* x) { copy16(x + 4, x, true); }

__global__ void copy_without_wait(const float* x) {
  SHARED_MEMORY(shared);
  copy16(shared + threadIdx.x * 16, x, true);
  commit_copies();
}

__global__ void barrier_for_some() {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void warp_divided() {
  if (threadIdx.x < 16) {
    shuffle_xor(1.0f, 1);
  } else {
    __syncwarp();
  }
}

__global__ void warp_without_a_lane() {
  if (threadIdx.x != 7) shuffle_xor(1.0f, 1);
}

__global__ void too_much_shared(float* x) {
  SHARED_ARRAY(float, big, [13000]);
  big[threadIdx.x] = x[0];
}

// Fine: a copy shows after its wait, and not before; blocks start with fresh 0xff bytes.
__global__ void copies_arrive_at_the_wait(const float* x, float* y) {
  SHARED_ARRAY(alignas(16) float, shared, [2][4]);
  copy16(shared[0], x, true);
  commit_copies();
  copy16(shared[1], x, false);
  commit_copies();
  y[0] = shared[0][0];
  wait_for_copies<1>();
  y[1] = shared[0][0];
  y[2] = shared[1][0];
  wait_for_copies<0>();
  y[3] = shared[1][0];
}

// c [16, 8] = a [16, 16] b [8, 16]^T
template <class E>
__global__ void multiply(const E* a, const E* b, float* c) {
  SHARED_MEMORY(memory);
  E* shared = reinterpret_cast<E*>(memory);
  const int lane = threadIdx.x;
  copy16(shared + lane * 8, a + lane * 8, true);
  if (lane < 16) copy16(shared + 256 + lane * 8, b + lane * 8, true);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  uint32_t left[4], right[4];
  float acc[4] = {};
  load_matrix(left, shared + lane % 16 * 16 + lane / 16 * 8);
  load_matrix(right, shared + 256 + lane % 8 * 16 + lane / 8 % 2 * 8);
  mma<E>(acc, left, right);
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = acc[i];
}

template <class E>
float error_of_mma() {
  alignas(16) static E a[256], b[128];
  float exact_a[256], exact_b[128], error = 0;
  std::vector<float> c(128);
  for (int i = 0; i < 256; ++i) a[i] = narrow<E>(exact_a[i] = static_cast<float>(i * 37 % 11 - 5));
  for (int i = 0; i < 128; ++i) b[i] = narrow<E>(exact_b[i] = static_cast<float>(i * 29 % 13 - 6));
  const E *left = a, *right = b;
  launch(multiply<E>, 1, 32, 768, nullptr, left, right, c.data());
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += exact_a[m * 16 + k] * exact_b[n * 16 + k];
      error += std::abs(sum - c[m * 8 + n]);
    }
  }
  return error;
}

}  // namespace

int main(int, char** arguments) {
  const std::string name = arguments[1];
  alignas(16) static float x[16] = {5};
  const float* read = x;
  float* write = x;
#define CASE(kernel, threads, bytes, ...) \
  if (name == #kernel) std::puts(launch(kernel, 1, threads, bytes, nullptr __VA_ARGS__) ? "refused" : "ran")
  CASE(misaligned_load, 1, 0, , read);
  CASE(misaligned_store, 1, 0, , write);
  CASE(misaligned_pack, 1, 0, , read);
  CASE(misaligned_copy, 1, 64, , read);
  CASE(misaligned_copy_target, 1, 64, , read);
  CASE(misaligned_matrix, 32, 1024, );
  CASE(copy_to_global, 1, 64, , write);
  CASE(copy_without_wait, 2, 64, , read);
  CASE(barrier_for_some, 64, 0, );
  CASE(warp_divided, 32, 0, );
  CASE(warp_without_a_lane, 32, 0, );
  CASE(too_much_shared, 32, 0, , write);
  if (name == "too_many_threads") std::puts(launch(barrier_for_some, 1, 1025, 0, nullptr));
  if (name == "copies") {
    float y[4];
    float* found = y;
    launch(copies_arrive_at_the_wait, 1, 1, 0, nullptr, read, found);
    std::printf("%d %g %d %g\n", y[0] != y[0], y[1], y[2] != y[2], y[3]);
  }
  if (name == "mma") std::printf("%g %g\n", error_of_mma<bfloat16>(), error_of_mma<float16>());
}
