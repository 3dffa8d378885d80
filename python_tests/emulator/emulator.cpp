#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_pipeline.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;
unsigned char* emulator_shared;
unsigned char emulator_lanes[1024][16];

namespace {

constexpr int kMost = 1024;
constexpr size_t kStack = 128 << 10;

enum State { kReady, kAtBlock, kAtWarp, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes, zeros;
};
struct Fiber {
  State state;
  ucontext_t context;
  std::deque<std::vector<Copy>> batches;
  std::vector<Copy> open;
};

Fiber fibers[kMost];
ucontext_t scheduler;
std::vector<char> stacks(kStack* kMost);
const std::function<void()>* body;
unsigned current;

[[noreturn]] void fail(const char* what) {
  fprintf(stderr, "emulator: %s, block %u\n", what, blockIdx.x);
  abort();
}

void entry() {
  (*body)();
  __pipeline_commit();
  for (const std::vector<Copy>& batch : fibers[current].batches) {
    if (!batch.empty()) fail("a copy that nobody awaits");
  }
  fibers[current].batches.clear();
  fibers[current].state = kDone;
}

void wait(State state) {
  const unsigned me = current;
  fibers[me].state = state;
  swapcontext(&fibers[me].context, &scheduler);
}

void finish(const Copy& copy) {
  memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
  memset(static_cast<char*>(copy.to) + copy.bytes - copy.zeros, 0, copy.zeros);
}

// Lets go whoever has all of its block or warp waiting beside it; whether there was any.
bool release(unsigned n) {
  const auto all = [&](unsigned begin, unsigned end, State state) {
    return std::all_of(fibers + begin, fibers + end,
                       [&](const Fiber& f) { return f.state == state; });
  };
  const auto ready = [&](unsigned begin, unsigned end) {
    for (unsigned t = begin; t < end; ++t) fibers[t].state = kReady;
  };
  bool any = all(0, n, kAtBlock);
  if (any) ready(0, n);
  for (unsigned warp = 0; warp < n; warp += 32) {
    if (!all(warp, warp + 32, kAtWarp)) continue;
    ready(warp, warp + 32);
    any = true;
  }
  return any;
}

void run_block(const std::vector<unsigned>& order) {
  const unsigned n = blockDim.x;
  for (unsigned t = 0; t < n; ++t) {
    fibers[t].state = kReady;
    getcontext(&fibers[t].context);
    fibers[t].context.uc_stack.ss_sp = stacks.data() + t * kStack;
    fibers[t].context.uc_stack.ss_size = kStack;
    fibers[t].context.uc_link = &scheduler;
    makecontext(&fibers[t].context, entry, 0);
  }
  for (;;) {
    bool ran = false;
    for (unsigned t : order) {
      if (fibers[t].state != kReady) continue;
      ran = true;
      current = t;
      threadIdx = dim3(t);
      swapcontext(&scheduler, &fibers[t].context);
    }
    if (std::all_of(fibers, fibers + n, [](const Fiber& f) { return f.state == kDone; })) return;
    if (!release(n) && !ran) fail("a barrier that not all threads reach");
  }
}

}  // namespace

void __syncthreads() { wait(kAtBlock); }

void emulator_warp_barrier() { wait(kAtWarp); }

void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros) {
  const bool sized = bytes == 4 || bytes == 8 || bytes == 16;
  if (!sized || zeros > bytes || reinterpret_cast<uintptr_t>(to) % bytes != 0 ||
      (zeros < bytes && reinterpret_cast<uintptr_t>(from) % bytes != 0)) {
    fail("a misaligned asynchronous copy");
  }
  memset(to, 0xFF, bytes);
  fibers[current].open.push_back({to, from, bytes, zeros});
}

void __pipeline_commit() {
  Fiber& f = fibers[current];
  f.batches.push_back(std::move(f.open));
  f.open.clear();
}

void __pipeline_wait_prior(int batches) {
  Fiber& f = fibers[current];
  for (; f.batches.size() > size_t(batches); f.batches.pop_front()) {
    for (const Copy& copy : f.batches.front()) finish(copy);
  }
}

void emulator_run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  static std::mutex mutex;
  static std::mt19937 random(1);
  const std::lock_guard<std::mutex> lock(mutex);
  const char* wish = getenv("EMULATOR_ORDER");  // "", "reverse" or "random"
  const std::string order_name = wish == nullptr ? "" : wish;
  const unsigned n = config.blockDim.x;
  if (config.gridDim.x == 0 || n == 0 || n > kMost || n % 32 != 0 ||
      config.dynamicSmemBytes > 98u << 10) {
    fail("a launch that some GPU refuses");  // 99 KiB a block on sm_86, 89 and 120
  }
  body = &kernel;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  std::vector<unsigned> order(n), blocks(gridDim.x);
  std::iota(order.begin(), order.end(), 0u);
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (order_name == "reverse") std::reverse(order.begin(), order.end());
  if (order_name == "random") std::shuffle(blocks.begin(), blocks.end(), random);
  for (unsigned block : blocks) {
    blockIdx = dim3(block);
    if (order_name == "random") std::shuffle(order.begin(), order.end(), random);
    const std::unique_ptr<void, decltype(&free)> shared(
        aligned_alloc(16, (config.dynamicSmemBytes + 15) / 16 * 16), free);
    emulator_shared = static_cast<unsigned char*>(shared.get());
    memset(emulator_shared, 0xFF, config.dynamicSmemBytes);
    run_block(order);
  }
}
