// Which table of kernels serves a call.

#include "python/kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(HOS_X86)
#include <cpuid.h>
#endif

namespace hos {

namespace baseline {
extern const Kernels table;
}
#if defined(HOS_X86)
namespace x86_v3 {
extern const Kernels table;
}
namespace x86_v4 {
extern const Kernels table;
}
#endif
#if defined(HOS_CUDA)
namespace cuda {
extern const Kernels table;
}
#endif

namespace {

#if defined(HOS_X86)
// F16C and LZCNT, whose names __builtin_cpu_supports of Clang does not know.
bool has_f16c_and_lzcnt() {
  unsigned a = 0, b = 0, c = 0, d = 0, extended = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !__get_cpuid(0x80000001, &a, &b, &extended, &d)) {
    return false;
  }
  return (c >> 29 & 1) == 1 && (extended >> 5 & 1) == 1;
}
#endif

const Kernels& choose() {
  const char* wish = std::getenv("HOS_CPU_LEVEL");
  const std::string name = wish == nullptr ? "" : wish;
  if (!name.empty() && name != "baseline" && name != "x86_v3" && name != "x86_v4") {
    throw std::invalid_argument("HOS_CPU_LEVEL must be baseline, x86_v3 or x86_v4, got " + name);
  }
#if defined(HOS_X86)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                  has_f16c_and_lzcnt();
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if ((name == "x86_v4" && !v4) || (name == "x86_v3" && !v3)) {
    throw std::invalid_argument("HOS_CPU_LEVEL=" + name + " is not supported by this processor");
  }
  if (v4 && (name.empty() || name == "x86_v4")) return x86_v4::table;
  if (v3 && name != "baseline") return x86_v3::table;
#else
  if (!name.empty() && name != "baseline") {
    throw std::invalid_argument("HOS_CPU_LEVEL must be baseline on this processor, got " + name);
  }
#endif
  return baseline::table;
}

}  // namespace

const Kernels& cpu_kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const Kernels& kernels(const Queue& queue) {
  if (queue.on_cpu()) return cpu_kernels();
#if defined(HOS_CUDA)
  return cuda::table;
#else
  throw std::runtime_error("hos_ext: built without CUDA");
#endif
}

}  // namespace hos
