// Langevin and Ozaki steps on the CPU, and the noise that drives them: one pass over x, score, diag
// and out, normals made in registers and a 256-byte buffer. Compute-bound: Philox and Box-Muller
// are more than half of the time. Compiled with contraction off (see common.h).

#include "ozaki.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "parallel.h"
#include "philox.h"
#include "storage.h"

HOS_DECLARE_KERNELS(HOS_ISA)

namespace hos {
inline namespace HOS_ISA {

namespace {

constexpr int kCounters = 16;             // counters made together
constexpr int kBlock = 4 * kCounters;     // elements of such a block
constexpr int64_t kGrain = 128 * kBlock;  // elements below which no second thread wakes

struct BlockWords {
  alignas(64) uint32_t w[4][kCounters];
};

// A vector of counters, and the widening product that compilers do not find by themselves.
#if defined(__AVX512F__)
typedef uint64_t Lanes __attribute__((vector_size(64)));
typedef uint32_t Narrow __attribute__((vector_size(32)));
#elif defined(__AVX2__)
typedef uint64_t Lanes __attribute__((vector_size(32)));
typedef uint32_t Narrow __attribute__((vector_size(16)));
#else
typedef uint64_t Lanes __attribute__((vector_size(16)));
typedef uint32_t Narrow __attribute__((vector_size(8)));
#endif
struct WideLanesProduct {
  Lanes operator()(Lanes c, uint32_t m) const {
#if defined(__AVX512F__)
    return Lanes(_mm512_mul_epu32(__m512i(c), _mm512_set1_epi64(int64_t(m))));
#elif defined(__AVX2__)
    return Lanes(_mm256_mul_epu32(__m256i(c), _mm256_set1_epi64x(int64_t(m))));
#elif defined(__SSE2__)
    return Lanes(_mm_mul_epu32(__m128i(c), _mm_set1_epi64x(int64_t(m))));
#else
    return (c & 0xFFFFFFFFu) * uint64_t(m);
#endif
  }
};
constexpr int kLanes = int(sizeof(Lanes) / sizeof(uint64_t));

inline void philox_block(uint64_t block, const NoiseKey& key, BlockWords* words) {
  Lanes step;
  for (int k = 0; k < kLanes; ++k) step[k] = uint64_t(k);
  for (int j = 0; j < kCounters; j += kLanes) {
    const Lanes counter = step + (block * kCounters + uint64_t(j));
    const Lanes zero = step ^ step;
    Lanes c[4] = {counter, counter >> 32, zero + key.tag, zero + (key.tag >> 32)};
    philox_rounds(c, key.seed, WideLanesProduct());
    for (int k = 0; k < 4; ++k) {
      const Narrow word = __builtin_convertvector(c[k], Narrow);
      memcpy(&words->w[k][j], &word, sizeof word);
    }
  }
}

template <class A>
inline void normal_block(uint64_t block, const NoiseKey& key, A* z) {
  BlockWords words;
  philox_block(block, key, &words);
  alignas(64) A lane[4][kCounters];
  for (int j = 0; j < kCounters; ++j) {
    const Pair<A> one = box_muller(words.w[0][j], words.w[1][j], A());
    lane[0][j] = one.a;
    lane[1][j] = one.b;
  }
  for (int j = 0; j < kCounters; ++j) {
    const Pair<A> two = box_muller(words.w[2][j], words.w[3][j], A());
    lane[2][j] = two.a;
    lane[3][j] = two.b;
  }
  for (int j = 0; j < kCounters; ++j) {
    for (int k = 0; k < 4; ++k) z[4 * j + k] = lane[k][j];
  }
}

template <class A>
inline void uniform_block(uint64_t block, const NoiseKey& key, A* u) {
  BlockWords words;
  philox_block(block, key, &words);
  for (int j = 0; j < kCounters; ++j) {
    for (int k = 0; k < 4; ++k) u[4 * j + k] = to_unit(words.w[k][j], A());
  }
}

template <class T>
void fill(const NoiseKey& key, bool uniform, int64_t n, T* out, int threads) {
  using A = typename Acc<T>::type;
  advise_huge_pages(out, n * int64_t(sizeof(T)));
  parallel_for(n, kBlock, kGrain, threads, [&](int64_t begin, int64_t end) {
    alignas(64) A z[kBlock];
    for (int64_t i = begin; i < end;) {
      const uint64_t element = key.start + uint64_t(i);
      const int lane = int(element % kBlock);
      const int count = int(std::min<int64_t>(kBlock - lane, end - i));
      if (uniform) {
        uniform_block(element / kBlock, key, z);
      } else {
        normal_block(element / kBlock, key, z);
      }
      for (int j = 0; j < count; ++j) narrow(z[lane + j], out + i + j);
      i += count;
    }
  });
}

// The normals of consecutive elements, block by block, at any starting point.
template <class A>
class NoiseWalk {
 public:
  explicit NoiseWalk(const NoiseKey& key) : key_(key) {}
  // Normals from `element` on; *count is cut to what its block still holds.
  const A* at(uint64_t element, int64_t* count) {
    const uint64_t block = element / kBlock;
    const int lane = int(element % kBlock);
    if (!valid_ || block != block_) {
      normal_block(block, key_, z_);
      block_ = block;
      valid_ = true;
    }
    *count = std::min<int64_t>(*count, kBlock - lane);
    return z_ + lane;
  }

 private:
  NoiseKey key_;
  uint64_t block_ = 0;
  bool valid_ = false;
  alignas(64) A z_[kBlock];
};

template <class T>
inline const T* row_of(const void* base, int64_t stride, int64_t row) {
  return static_cast<const T*>(base) + row * stride;
}

template <class T>
inline T* row_of(void* base, int64_t stride, int64_t row) {
  return static_cast<T*>(base) + row * stride;
}

// Visits flat elements [begin, end) in stretches that stay in one row and one block of noise:
// visit(row, column, count, z). A given noise is widened into the same buffer.
template <class T, class Visit>
inline void walk(const StepArgs& a, int64_t begin, int64_t end, const Visit& visit) {
  using A = typename Acc<T>::type;
  NoiseWalk<A> noise(NoiseKey{a.seed, a.tag, a.start});
  alignas(64) A given[kBlock];
  int64_t row = begin / a.size;
  int64_t column = begin % a.size;
  for (int64_t flat = begin; flat < end;) {
    int64_t count = std::min(a.size - column, end - flat);
    const A* z = given;
    if (a.noise == nullptr) {
      z = noise.at(a.start + uint64_t(flat), &count);
    } else {
      count = std::min<int64_t>(count, kBlock);
      const T* source = row_of<T>(a.noise, a.noise_row, row) + column;
      for (int64_t j = 0; j < count; ++j) given[j] = widen(source[j]);
    }
    visit(row, column, count, z);
    flat += count;
    column += count;
    if (column == a.size) {
      column = 0;
      ++row;
    }
  }
}

// body(constant) with the curvature as a compile-time constant, so that its loop vectorises.
template <class Body>
inline void with_curvature(int curvature, const Body& body) {
  if (curvature == kClamp) {
    body(std::integral_constant<int, kClamp>());
  } else if (curvature == kAbs) {
    body(std::integral_constant<int, kAbs>());
  } else {
    body(std::integral_constant<int, kRaw>());
  }
}

template <class A>
inline A step_size_of(const StepArgs& a, int64_t row) {
  return A(a.step_sizes != nullptr ? a.step_sizes[row] : a.step_size);
}

// Rows that follow one another without a gap, under one step size, are one long row.
StepArgs joined(const StepArgs& a) {
  const auto dense = [&](const void* p, int64_t stride) {
    return p == nullptr || stride == a.size;
  };
  if (a.step_sizes != nullptr || !dense(a.x, a.x_row) || !dense(a.score, a.score_row) ||
      !dense(a.diag, a.diag_row) || !dense(a.noise, a.noise_row) || !dense(a.out, a.out_row) ||
      !dense(a.grad, a.grad_row)) {
    return a;
  }
  StepArgs one = a;
  one.size = a.rows * a.size;
  one.rows = one.size > 0 ? 1 : 0;
  return one;
}

template <class T>
void step(const StepArgs& a, int threads) {
  using A = typename Acc<T>::type;
  if (a.out_row == a.size) advise_huge_pages(a.out, a.rows * a.size * int64_t(sizeof(T)));
  parallel_for(a.rows * a.size, kBlock, kGrain, threads, [&](int64_t begin, int64_t end) {
    walk<T>(a, begin, end, [&](int64_t row, int64_t column, int64_t count, const A* z) {
      const T* x = row_of<T>(a.x, a.x_row, row) + column;
      const T* s = row_of<T>(a.score, a.score_row, row) + column;
      T* out = row_of<T>(a.out, a.out_row, row) + column;
      const A h = step_size_of<A>(a, row);
      if (a.diag == nullptr) {
        const A spread = square_root(A(2) * h);
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j) {
          narrow(langevin_element(widen(x[j]), widen(s[j]), h, spread, z[j]), out + j);
        }
        return;
      }
      const T* d = row_of<T>(a.diag, a.diag_row, row) + column;
      with_curvature(a.curvature, [&](auto curvature) {
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j) {
          narrow(ozaki_element(widen(x[j]), widen(s[j]), widen(d[j]), h, z[j], curvature), out + j);
        }
      });
    });
  });
}

template <class T>
void step_backward(const StepArgs& a, int threads) {
  using A = typename Acc<T>::type;
  parallel_for(a.rows * a.size, kBlock, kGrain, threads, [&](int64_t begin, int64_t end) {
    walk<T>(a, begin, end, [&](int64_t row, int64_t column, int64_t count, const A* z) {
      const T* g = row_of<T>(a.grad, a.grad_row, row) + column;
      const A h = step_size_of<A>(a, row);
      const int64_t flat = row * a.size + column;  // gradients are written densely
      const auto put = [&](void* base, int64_t j, A value) {
        if (base != nullptr) narrow(value, static_cast<T*>(base) + flat + j);
      };
      if (a.diag == nullptr) {
        for (int64_t j = 0; j < count; ++j) {
          const StepGrad<A> grad = langevin_element_vjp(h, A(widen(g[j])));
          put(a.grad_score, j, grad.score);
          put(a.grad_noise, j, grad.noise);
        }
        return;
      }
      const T* s = row_of<T>(a.score, a.score_row, row) + column;
      const T* d = row_of<T>(a.diag, a.diag_row, row) + column;
      alignas(64) A by_score[kBlock], by_diag[kBlock], by_noise[kBlock];
      with_curvature(a.curvature, [&](auto curvature) {
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j) {
          const StepGrad<A> grad =
              ozaki_element_vjp(widen(s[j]), widen(d[j]), h, z[j], curvature, widen(g[j]));
          by_score[j] = grad.score;
          by_diag[j] = grad.diag;
          by_noise[j] = grad.noise;
        }
      });
      for (int64_t j = 0; j < count; ++j) {
        put(a.grad_score, j, by_score[j]);
        put(a.grad_diag, j, by_diag[j]);
        put(a.grad_noise, j, by_noise[j]);
      }
    });
  });
}

}  // namespace

void noise_cpu(const NoiseKey& key, int uniform, int dtype, int64_t n, void* out, int threads) {
  if (dtype == kFloat32) fill(key, uniform != 0, n, static_cast<float*>(out), threads);
  if (dtype == kFloat64) fill(key, uniform != 0, n, static_cast<double*>(out), threads);
  if (dtype == kFloat16) fill(key, uniform != 0, n, static_cast<half_t*>(out), threads);
  if (dtype == kBFloat16) fill(key, uniform != 0, n, static_cast<bfloat_t*>(out), threads);
}

int64_t step_cpu(const StepArgs& args, int dtype, int threads) {
  if (args.step_sizes != nullptr) {
    for (int64_t row = 0; row < args.rows; ++row) {
      const double h = args.step_sizes[row];
      if (!(h > 0.0 && h <= 1.7976931348623157e308)) return row + 1;
    }
  }
  const StepArgs a = joined(args);
  if (dtype == kFloat32) step<float>(a, threads);
  if (dtype == kFloat64) step<double>(a, threads);
  if (dtype == kFloat16) step<half_t>(a, threads);
  if (dtype == kBFloat16) step<bfloat_t>(a, threads);
  return 0;
}

void step_backward_cpu(const StepArgs& args, int dtype, int threads) {
  const StepArgs a = joined(args);
  if (dtype == kFloat32) step_backward<float>(a, threads);
  if (dtype == kFloat64) step_backward<double>(a, threads);
  if (dtype == kFloat16) step_backward<half_t>(a, threads);
  if (dtype == kBFloat16) step_backward<bfloat_t>(a, threads);
}

}  // namespace HOS_ISA
}  // namespace hos
