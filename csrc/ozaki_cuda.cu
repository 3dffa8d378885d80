// Langevin and Ozaki steps on CUDA, and the noise that drives them. A thread owns one Philox
// counter, four elements that follow one another: normals stay in registers, and where rows and
// pointers are aligned each array is read or written as one vector. Bytes moved for an element:
// x, score, diag in, out back (16 in float32); the noise none. About 110 instructions an element,
// more than half of them for the noise: on recent GPUs they take nearly as long as the bytes, and
// in 16-bit storage longer, so that wider accesses than a counter's four elements would gain
// nothing.

#include "launch.cuh"
#include "ozaki.h"
#include "philox.h"
#include "storage.h"

namespace hos {
inline namespace HOS_ISA {

namespace {

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};

// The elements of one counter: lanes [first, last) exist, from `row` and `column` on.
struct Quad {
  bool whole;  // all four exist, in one row, and every array is aligned to them
  int first, last;
  int64_t row, column, size;

  // Where lane k lies; a lane that does not exist repeats the place of one that does, so that
  // reading it is safe.
  __device__ __forceinline__ void place(int k, int64_t* to_row, int64_t* to_column) const {
    const int lane = k < first ? first : k < last ? k : last - 1;
    int64_t i = row, j = column + (lane - first);
    for (; j >= size; j -= size) ++i;
    *to_row = i;
    *to_column = j;
  }
};

__device__ __forceinline__ Quad quad_at(int64_t flat, int64_t total, int64_t size, bool whole) {
  Quad q;
  q.first = flat < 0 ? int(-flat) : 0;
  q.last = total - flat < 4 ? int(total - flat) : 4;
  q.whole = whole && q.first == 0 && q.last == 4;
  q.size = size;
  const int64_t from = flat + q.first;
  if (size == total) {  // one row: no division
    q.row = 0;
    q.column = from;
  } else if (total <= int64_t(0xFFFFFFFF)) {
    q.row = uint32_t(from) / uint32_t(size);
    q.column = uint32_t(from) - uint32_t(q.row) * uint32_t(size);
  } else {
    q.row = from / size;
    q.column = from - q.row * size;
  }
  return q;
}

// visit(quad, counter) for the `total` elements from `start` on, in rows of `size`.
template <class Visit>
__device__ void for_quads(uint64_t start, int64_t total, int64_t size, bool whole,
                          const Visit& visit) {
  const int64_t lead = int64_t(start % 4);  // lanes of the first counter that lie before the array
  const int64_t quads = ceil_div(total + lead, 4);
  for (int64_t j = thread_index(); j < quads; j += grid_threads()) {
    const int64_t flat = 4 * j - lead;
    visit(quad_at(flat, total, size, whole), (start + uint64_t(flat)) / 4);
  }
}

template <class T, class A>
__device__ void load(const void* base, int64_t stride, const Quad& q, A* to) {
  const T* from = static_cast<const T*>(base);
  Four<T> four;
  if (q.whole) {
    four = *reinterpret_cast<const Four<T>*>(from + q.row * stride + q.column);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      int64_t row, column;
      q.place(k, &row, &column);
      four.v[k] = from[row * stride + column];
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) to[k] = widen(four.v[k]);
}

template <class T, class A>
__device__ void store(const A* from, const Quad& q, void* base, int64_t stride) {
  T* to = static_cast<T*>(base);
  Four<T> four;
#pragma unroll
  for (int k = 0; k < 4; ++k) narrow(from[k], &four.v[k]);
  if (q.whole) {
    *reinterpret_cast<Four<T>*>(to + q.row * stride + q.column) = four;
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    int64_t row, column;
    q.place(k, &row, &column);
    if (k >= q.first && k < q.last) to[row * stride + column] = four.v[k];
  }
}

// The key with seed and offset from device memory where they are given there.
__device__ NoiseKey read_key(NoiseKey key, const uint64_t* seed, const uint64_t* offset) {
  constexpr uint64_t kOffset = (uint64_t(1) << 56) - 1;  // the stream lies above
  if (seed != nullptr) key.seed = *seed;
  if (offset != nullptr) key.tag = (key.tag & ~kOffset) | ((key.tag + *offset) & kOffset);
  return key;
}

template <class A>
__device__ void draw(const NoiseKey& key, uint64_t counter, bool uniform, A* z) {
  const Words words = philox(counter, key.tag, key.seed);
  if (uniform) {
#pragma unroll
    for (int k = 0; k < 4; ++k) z[k] = to_unit(words.w[k], A());
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; k += 2) {
    const Pair<A> two = box_muller(words.w[k], words.w[k + 1], A());
    z[k] = two.a;
    z[k + 1] = two.b;
  }
}

// The step size of lane k.
template <class A>
__device__ __forceinline__ A step_size_of(const StepArgs& a, const Quad& q, int k) {
  if (a.step_sizes == nullptr) return A(a.step_size);
  int64_t row = q.row, column;
  if (!q.whole) q.place(k, &row, &column);
  return A(a.step_sizes[row]);
}

// The noise of a step: given, or drawn here.
template <class T, class A>
__device__ void noise_of(const StepArgs& a, const NoiseKey& key, const Quad& q, uint64_t counter,
                         A* z) {
  if (a.noise != nullptr) {
    load<T>(a.noise, a.noise_row, q, z);
  } else {
    draw(key, counter, false, z);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    noise_kernel(NoiseKey given, const uint64_t* seed, const uint64_t* offset, bool uniform,
                 int64_t n, void* out, bool whole) {
  const NoiseKey key = read_key(given, seed, offset);
  for_quads(key.start, n, n, whole, [&](const Quad& q, uint64_t counter) {
    typename Acc<T>::type z[4];
    draw(key, counter, uniform, z);
    store<T>(z, q, out, n);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) step_kernel(StepArgs a, bool whole) {
  using A = typename Acc<T>::type;
  const NoiseKey key = read_key(NoiseKey{a.seed, a.tag, a.start}, a.seed_pointer, a.offset_pointer);
  for_quads(key.start, a.rows * a.size, a.size, whole, [&](const Quad& q, uint64_t counter) {
    A x[4], s[4], d[4] = {}, z[4], out[4];
    load<T>(a.x, a.x_row, q, x);
    load<T>(a.score, a.score_row, q, s);
    if (a.diag != nullptr) load<T>(a.diag, a.diag_row, q, d);
    noise_of<T>(a, key, q, counter, z);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const A h = step_size_of<A>(a, q, k);
      out[k] = a.diag == nullptr ? langevin_element(x[k], s[k], h, square_root(A(2) * h), z[k])
                                 : ozaki_element(x[k], s[k], d[k], h, z[k], a.curvature);
    }
    store<T>(out, q, a.out, a.out_row);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) step_backward_kernel(StepArgs a, bool whole) {
  using A = typename Acc<T>::type;
  const NoiseKey key = read_key(NoiseKey{a.seed, a.tag, a.start}, a.seed_pointer, a.offset_pointer);
  for_quads(key.start, a.rows * a.size, a.size, whole, [&](const Quad& q, uint64_t counter) {
    A grad[4], s[4] = {}, d[4] = {}, z[4] = {}, score[4], diag[4], noise[4];
    load<T>(a.grad, a.grad_row, q, grad);
    if (a.diag != nullptr) {
      load<T>(a.score, a.score_row, q, s);
      load<T>(a.diag, a.diag_row, q, d);
      noise_of<T>(a, key, q, counter, z);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const A h = step_size_of<A>(a, q, k);
      const StepGrad<A> g = a.diag == nullptr
                                ? langevin_element_vjp(h, grad[k])
                                : ozaki_element_vjp(s[k], d[k], h, z[k], a.curvature, grad[k]);
      score[k] = g.score;
      diag[k] = g.diag;
      noise[k] = g.noise;
    }
    if (a.grad_score != nullptr) store<T>(score, q, a.grad_score, a.size);
    if (a.grad_diag != nullptr) store<T>(diag, q, a.grad_diag, a.size);
    if (a.grad_noise != nullptr) store<T>(noise, q, a.grad_noise, a.size);
  });
}

// One kernel for each DType, in its order.
constexpr decltype(&noise_kernel<float>) kNoise[] = {noise_kernel<float>, noise_kernel<double>,
                                                     noise_kernel<half_t>, noise_kernel<bfloat_t>};
constexpr decltype(&step_kernel<float>) kStep[] = {step_kernel<float>, step_kernel<double>,
                                                   step_kernel<half_t>, step_kernel<bfloat_t>};
constexpr decltype(&step_kernel<float>) kStepBackward[] = {
    step_backward_kernel<float>, step_backward_kernel<double>, step_backward_kernel<half_t>,
    step_backward_kernel<bfloat_t>};
constexpr uintptr_t kFourBytes[] = {16, 32, 8, 8};

bool aligned(const void* base, int dtype) {
  return reinterpret_cast<uintptr_t>(base) % kFourBytes[dtype] == 0;
}

// Whether a counter's elements lie in one row and every array can move them at once.
bool whole_quads(const StepArgs& a, int dtype) {
  bool whole = a.start % 4 == 0 && (a.rows == 1 || a.size % 4 == 0);
  const auto has = [&](const void* base, int64_t stride) {
    whole = whole && aligned(base, dtype) && (a.rows == 1 || base == nullptr || stride % 4 == 0);
  };
  has(a.x, a.x_row);
  has(a.score, a.score_row);
  has(a.diag, a.diag_row);
  has(a.noise, a.noise_row);
  has(a.grad, a.grad_row);
  has(a.out, a.out_row);
  has(a.grad_score, a.size);
  has(a.grad_diag, a.size);
  has(a.grad_noise, a.size);
  return whole;
}

// Dense rows with one step size as a single row: no division to find an element's place.
StepArgs flattened(StepArgs a) {
  const auto dense = [&](const void* base, int64_t stride) {
    return base == nullptr || stride == a.size;
  };
  if (a.step_sizes == nullptr && dense(a.x, a.x_row) && dense(a.score, a.score_row) &&
      dense(a.diag, a.diag_row) && dense(a.noise, a.noise_row) && dense(a.grad, a.grad_row) &&
      dense(a.out, a.out_row)) {
    a.size *= a.rows;
    a.rows = 1;
  }
  return a;
}

// Blocks for `n` elements, which may start inside a counter.
int64_t quad_blocks(int64_t n) { return n > 0 ? ceil_div(ceil_div(n + 3, 4), kThreads) : 0; }

void launch_steps(const char* name, decltype(&step_kernel<float>) kernel, const StepArgs& args,
                  int dtype, Launch where) {
  StepArgs a = flattened(args);
  if (a.noise != nullptr) a.start = 0;  // counters matter to drawn noise alone
  launch(name, kernel, quad_blocks(a.rows * a.size), where, a, whole_quads(a, dtype));
}

}  // namespace

}  // namespace HOS_ISA

void noise_cuda(const NoiseKey& key, const uint64_t* seed, const uint64_t* offset, int uniform,
                int dtype, int64_t n, void* out, Launch where) {
  const bool whole = key.start % 4 == 0 && aligned(out, dtype);
  launch("noise", kNoise[dtype], quad_blocks(n), where, key, seed, offset, uniform != 0, n, out,
         whole);
}

void step_cuda(const StepArgs& a, int dtype, Launch where) {
  launch_steps("step", kStep[dtype], a, dtype, where);
}

void step_backward_cuda(const StepArgs& a, int dtype, Launch where) {
  launch_steps("step_backward", kStepBackward[dtype], a, dtype, where);
}

// Major versions decide: a driver runs the runtime of every minor version of its major one. (The
// PTX of a newer minor version it refuses: there a binary for the very GPU is needed.)
int cuda_driver_too_old() {
  static const int answer = [] {
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return -1;
    return driver / 1000 >= CUDART_VERSION / 1000 ? 0 : driver;
  }();
  return answer;
}

}  // namespace hos
