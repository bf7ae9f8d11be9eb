// The emulator's blocks of threads: every CUDA thread is a fiber of one CPU thread, barriers are real barriers.
//
// A fiber runs its CUDA thread until that has to wait, then another fiber goes on; a thread that never waits costs no
// switch at all. Blocks run one after another, so there is one set of threadIdx and shared arrays at a time, and a race
// between threads shows as 0xff bytes, as a stale value, or as a difference between the two orders of threads.
//
// Whatever a GPU would answer with a fault, a hang or garbage ends the process with one sentence: see `fail`.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulator {

struct Index {
  unsigned x, y, z;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;  // y and z are 0 (1 for the sizes): launches are 1-dimensional

constexpr size_t SHARED_LIMIT = 163 * 1024;        // bytes a block at compute capability 8.0, the least of our targets
constexpr size_t STATIC_SHARED_LIMIT = 48 * 1024;  // nvcc's, for arrays of constant size

// Runs `kernel` for every thread of every block. Ends the process where threads never meet at a barrier.
void run(const std::function<void()>& kernel, int64_t blocks, int threads, size_t dynamic_bytes);

// Whether threads and blocks start from the last one: a kernel without races does not notice.
void reverse_order(bool reverse);

// Ends the process: prints "emulator: <what>", with block and thread where a kernel runs.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// __syncthreads(): every thread of the block must come.
void barrier();

// The block's shared array that a place in the source stands for, filled with 0xff at the start of the block.
void* shared_array(const void* place, size_t bytes);
unsigned char* dynamic_shared();
bool is_shared(const void* address, size_t bytes);

// What 32 lanes exchange in a warp operation: what each brought, and what was made of it.
struct Round {
  alignas(16) unsigned char brought[32][32];
  float result[128];
};

// Waits until every lane of the warp is at the operation `what`; the last one to come calls `combine`, if any. Valid
// until the lane's next exchange.
const Round& exchange(const char* what, const void* mine, size_t bytes, void (*combine)(Round&) = nullptr);

// cp.async: the 16 bytes arrive no sooner than at the wait for their group; until then there is 0xff in their place.
void copy_later(void* to, const void* from, bool valid);
void commit_copies();
void wait_for_copies(int groups_in_flight);

inline void check_aligned(const char* what, const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    fail("misaligned %s: address %p is not a multiple of %zu bytes", what, address, bytes);
}

}  // namespace emulator
