// The CPU parallel loop: contiguous ranges over OpenMP threads, none woken for work below a grain.
// Plain OpenMP shares the runtime that torch has loaded; a pool of our own would fight it.
#pragma once

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "base/common.h"

namespace hos {
inline namespace HOS_ISA {

// body(begin, end) over [0, n), in ranges that are multiples of `unit`, at least `grain` each.
template <class Body>
inline void parallel_for(int64_t n, int64_t unit, int64_t grain, int threads, const Body& body) {
  const int64_t useful = grain > 0 ? n / grain : n;
  const int team = int(useful < threads ? (useful < 1 ? 1 : useful) : threads);
  if (team <= 1) {
    if (n > 0) body(int64_t(0), n);
    return;
  }
  const int64_t units = (n + unit - 1) / unit;
  const int64_t share = (units + team - 1) / team * unit;
#pragma omp parallel for num_threads(team) schedule(static, 1)
  for (int t = 0; t < team; ++t) {
    const int64_t begin = t * share;
    const int64_t end = begin + share < n ? begin + share : n;
    if (begin < end) body(begin, end);
  }
}

// Aligned scratch memory of one thread.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n)
      : data_(static_cast<T*>(
            aligned_alloc(64, (size_t(n > 0 ? n : 1) * sizeof(T) + 63) / 64 * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// Page faults of a fresh large output cost more than the kernel that fills it (2 GB/s in 4 KiB
// pages): ask for huge pages before the first touch.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  const uintptr_t page = uintptr_t(1) << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / page * page;
  if (bytes >= int64_t(4 * page) && end > begin) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#else
  (void)data;
  (void)bytes;
#endif
}

// Whether memory has been written before: fresh pages have no frame yet.
inline bool is_touched([[maybe_unused]] const void* data) {
#if defined(__linux__)
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  unsigned char resident = 1;
  mincore(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(data) / page * page), 1, &resident);
  return (resident & 1) != 0;
#else
  return true;
#endif
}

// Orders stores past the caches before what follows.
inline void fence() {
#if defined(__SSE2__)
  __builtin_ia32_sfence();
#endif
}

}  // namespace HOS_ISA
}  // namespace hos
