// The scheduler of fibers.h. A fiber that waits hands over to the oldest ready one, else to one that starts the next
// thread; where neither is left, `run` looks whether the block has ended or hangs.
#include "fibers.h"

#include <pthread.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#include <sanitizer/common_interface_defs.h>
#define SANITIZED 1
#endif
#endif

namespace emulator {

Index threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t STACK = 512 * 1024;  // address space; pages are taken when they are used
constexpr size_t GUARD = 64 * 1024;   // below the stack, without access: an overflow faults
constexpr unsigned WARP = 32;

struct Copy {
  void* to;
  const void* from;
  bool valid;
  int group;
};

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  size_t stack_bytes = STACK;
  void* sanitizer_stack = nullptr;
  unsigned thread = 0;
  std::vector<Copy> copies;  // in flight, oldest first
  int groups = 0;            // committed
};

struct Warp {
  unsigned lanes = WARP, arrived = 0, turn = 0;
  const char* what = nullptr;
  std::vector<Fiber*> waiting;
  Round rounds[2];  // a lane may be one round ahead of those that still read
};

struct SharedArray {
  const void* place;
  size_t bytes;
  std::unique_ptr<unsigned char, void (*)(void*)> data;
};

std::mutex one_launch;
bool reverse = false;

Fiber host;                                  // the caller of `run`
Fiber* running = nullptr;                    // null: no kernel runs
std::vector<std::unique_ptr<Fiber>> fibers;  // all that were ever needed at once; kept for later launches
std::vector<Fiber*> idle;
std::deque<Fiber*> ready;

const std::function<void()>* body;
unsigned started, ended;
std::vector<Fiber*> at_barrier;
std::vector<Warp> warps;
std::vector<SharedArray> arrays;
char dynamic_place;  // its address stands for the dynamic array

void switch_to(Fiber* next) {
  Fiber* self = running;
  running = next;
  threadIdx = {next->thread, 0, 0};
#if SANITIZED
  __sanitizer_start_switch_fiber(&self->sanitizer_stack, next->stack, next->stack_bytes);
#endif
  swapcontext(&self->context, &next->context);
#if SANITIZED
  __sanitizer_finish_switch_fiber(self->sanitizer_stack, nullptr, nullptr);
#endif
}

void work();

void make_fiber() {
  fibers.push_back(std::make_unique<Fiber>());
  Fiber& made = *fibers.back();
  void* memory = mmap(nullptr, GUARD + STACK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for the stack of a thread");
  made.stack = static_cast<char*>(memory) + GUARD;
  mprotect(made.stack, STACK, PROT_READ | PROT_WRITE);
  getcontext(&made.context);
  made.context.uc_stack.ss_sp = made.stack;
  made.context.uc_stack.ss_size = STACK;
  made.context.uc_link = nullptr;
  makecontext(&made.context, work, 0);
  made.context.uc_stack.ss_size = 0;  // or AddressSanitizer forgets what it knows of the whole stack at every switch
  idle.push_back(&made);
}

Fiber* an_idle_fiber() {
  if (idle.empty()) make_fiber();
  Fiber* found = idle.back();
  idle.pop_back();
  return found;
}

// The running fiber has nothing to do for now: another goes on, or a new thread starts, or the caller of `run` decides.
void give_way() {
  if (!ready.empty()) {
    Fiber* next = ready.front();
    ready.pop_front();
    switch_to(next);
  } else if (started < blockDim.x) {
    switch_to(an_idle_fiber());
  } else {
    switch_to(&host);
  }
}

// Every fiber's life: to take the next thread of the block, again and again.
void work() {
#if SANITIZED
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  Fiber* self = running;
  for (;;) {
    while (started < blockDim.x) {
      self->thread = reverse ? blockDim.x - 1 - started : started;
      self->groups = 0;
      ++started;
      threadIdx = {self->thread, 0, 0};
      (*body)();
      if (!self->copies.empty()) fail("the thread ended while asynchronous copies were in flight");
      ++ended;
    }
    idle.push_back(self);
    give_way();
  }
}

void wake(std::vector<Fiber*>& waiting) {
  ready.insert(ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

void run_block() {
  for (SharedArray& array : arrays) std::memset(array.data.get(), 0xff, array.bytes);
  const unsigned count = (blockDim.x + WARP - 1) / WARP;
  if (warps.size() < count) warps.resize(count);
  for (unsigned w = 0; w < count; ++w) {
    warps[w].arrived = 0;
    warps[w].lanes = blockDim.x - w * WARP < WARP ? blockDim.x - w * WARP : WARP;
  }
  started = ended = 0;
  switch_to(an_idle_fiber());
  if (ended == blockDim.x) return;
  for (unsigned w = 0; w < count; ++w) {
    if (warps[w].arrived) {
      fail(
          "threads never meet: %u lanes of warp %u wait at %s, %zu threads of the block at __syncthreads, %u ended",
          warps[w].arrived, w, warps[w].what, at_barrier.size(), ended);
    }
  }
  fail("threads never meet: %zu of %u wait at __syncthreads, %u ended", at_barrier.size(), blockDim.x, ended);
}

}  // namespace

void fail(const char* format, ...) {
  std::fflush(stdout);
  std::fputs("emulator: ", stderr);
  va_list values;
  va_start(values, format);
  std::vfprintf(stderr, format, values);
  va_end(values);
  if (running) std::fprintf(stderr, " (block %u", blockIdx.x);
  if (running && running != &host) std::fprintf(stderr, ", thread %u", running->thread);
  std::fputs(running ? ")\n" : "\n", stderr);
  std::abort();
}

void run(const std::function<void()>& kernel, int64_t blocks, int threads, size_t dynamic_bytes) {
  const std::lock_guard<std::mutex> lock(one_launch);
  body = &kernel;
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  running = &host;
#if SANITIZED
  pthread_attr_t attributes;
  void* stack;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &host.stack_bytes);
  pthread_attr_destroy(&attributes);
  host.stack = static_cast<char*>(stack);
#endif
  if (dynamic_bytes) shared_array(&dynamic_place, dynamic_bytes);
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx = {static_cast<unsigned>(reverse ? blocks - 1 - block : block), 0, 0};
    run_block();
  }
  arrays.clear();
  running = nullptr;
}

void reverse_order(bool wanted) {
  const std::lock_guard<std::mutex> lock(one_launch);
  reverse = wanted;
}

void barrier() {
  if (at_barrier.size() + 1 < blockDim.x) {
    at_barrier.push_back(running);
    give_way();
  } else {
    wake(at_barrier);
  }
}

void* shared_array(const void* place, size_t bytes) {
  size_t total = bytes, fixed = place == &dynamic_place ? 0 : bytes;
  for (const SharedArray& array : arrays) {
    if (array.place == place) return array.data.get();
    total += array.bytes;
    fixed += array.place == &dynamic_place ? 0 : array.bytes;
  }
  if (total > SHARED_LIMIT || fixed > STATIC_SHARED_LIMIT) {
    fail(
        "a block takes %zu bytes of shared memory, %zu of them static: at most %zu and %zu", total, fixed, SHARED_LIMIT,
        STATIC_SHARED_LIMIT);
  }
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, bytes)) fail("no memory for %zu bytes of shared memory", bytes);
  std::memset(memory, 0xff, bytes);
  arrays.push_back({place, bytes, {static_cast<unsigned char*>(memory), std::free}});
  return memory;
}

unsigned char* dynamic_shared() {
  for (const SharedArray& array : arrays) {
    if (array.place == &dynamic_place) return array.data.get();
  }
  fail("the kernel uses dynamic shared memory, and was launched without");
}

bool is_shared(const void* address, size_t bytes) {
  const auto* first = static_cast<const unsigned char*>(address);
  for (const SharedArray& array : arrays) {
    if (first >= array.data.get() && first + bytes <= array.data.get() + array.bytes) return true;
  }
  return false;
}

const Round& exchange(const char* what, const void* mine, size_t bytes, void (*combine)(Round&)) {
  Fiber* self = running;
  Warp& warp = warps[self->thread / WARP];
  if (warp.arrived == 0) warp.what = what;
  if (std::strcmp(warp.what, what) != 0)
    fail("lanes of a warp are at different operations, %s and %s", warp.what, what);
  Round& round = warp.rounds[warp.turn % 2];
  std::memcpy(round.brought[self->thread % WARP], mine, bytes);
  if (++warp.arrived < warp.lanes) {
    warp.waiting.push_back(self);
    give_way();
    return round;
  }
  warp.arrived = 0;
  ++warp.turn;
  if (combine) combine(round);
  wake(warp.waiting);
  return round;
}

void copy_later(void* to, const void* from, bool valid) {
  check_aligned("asynchronous copy, destination", to, 16);
  check_aligned("asynchronous copy, source", from, 16);
  if (!is_shared(to, 16)) fail("the destination of an asynchronous copy must lie in shared memory");
  if (valid && is_shared(from, 16)) fail("the source of an asynchronous copy must lie in global memory");
  std::memset(to, 0xff, 16);
  running->copies.push_back({to, from, valid, running->groups});
}

void commit_copies() { ++running->groups; }

void wait_for_copies(int groups_in_flight) {
  std::vector<Copy>& copies = running->copies;
  auto copy = copies.begin();
  for (; copy != copies.end() && copy->group < running->groups - groups_in_flight; ++copy) {
    if (copy->valid) {
      std::memcpy(copy->to, copy->from, 16);
    } else {
      std::memset(copy->to, 0, 16);
    }
  }
  copies.erase(copies.begin(), copy);
}

}  // namespace emulator
