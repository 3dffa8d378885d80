// Entry-wise losses on CUDA, those without a factor. A block sums a chunk of rows of a sample, a
// warp a whole one where it is short; the chunks of a long sample are added in fixed order by a
// second kernel. Four entries a thread, 16 bytes at a time, where the arrays allow. Bytes moved:
// each input once; backward reads them again and writes each gradient.

#include "losses/sums.cuh"

namespace hos {
inline namespace HOS_ISA {

namespace {

constexpr int kFour = 4;                        // entries of a thread in one go
constexpr int64_t kShort = 1024;                // rows of a sample that a warp sums
constexpr int64_t kEntryChunk = 32 * kThreads;  // rows of a block's chunk

// Entries [i, i + 4) of a row, zeros from `end` on; `whole`: rows begin at multiples of 16 bytes.
template <class T>
__device__ __forceinline__ void load_four(const View& view, int64_t point, int64_t sample,
                                          int64_t i, int64_t end, bool whole, T (&to)[kFour]) {
  const T* from = place<T>(view, point, sample, i);
  if (whole && i + kFour <= end) {
    load_run<kFour>(from, to);
    return;
  }
#pragma unroll
  for (int k = 0; k < kFour; ++k) to[k] = i + k < end ? from[k] : T(0);
}

template <class T>
__device__ __forceinline__ void store_four(const T (&from)[kFour], int64_t i, int64_t end,
                                           bool whole, T* row) {
  if (whole && i + kFour <= end) {
    store_run<kFour>(from, row + i);
    return;
  }
#pragma unroll
  for (int k = 0; k < kFour; ++k) {
    if (i + k < end) row[i + k] = from[k];
  }
}

// Everything that four entries of a sample take part with.
template <class T>
struct Entries {
  T s[3][kFour] = {}, d[3][kFour] = {}, z[kFour];

  __device__ __forceinline__ void load(const LossArgs& a, int64_t sample, int64_t i, int64_t end,
                                       bool whole) {
    load_four(a.noise, 0, sample, i, end, whole, z);
#pragma unroll
    for (int point = 0; point < 3; ++point) {
      if (point < a.score_points) load_four(a.score, point, sample, i, end, whole, s[point]);
      if (a.diag.data != nullptr && point < points_of(a.kind)) {
        load_four(a.diag, point, sample, i, end, whole, d[point]);
      }
    }
  }

  __device__ __forceinline__ T value(const LossArgs& a, int k, T inverse) const {
    const T precision = inverse * inverse;
    if (a.kind == kDsm) return dsm_entry(s[0][k], z[k], inverse);
    if (a.kind == kDsmVr) return dsm_vr_entry(s[0][k], s[1][k], z[k], inverse);
    if (a.kind == kD2smDiag) return diagonal_entry(s[0][k], d[0][k], z[k], precision);
    return diagonal_vr_entry(s[0][k], s[1][k], s[2][k], d[0][k], d[1][k], d[2][k], z[k], precision,
                             a.score_points == 3);
  }
};

// The sum over rows [begin, end) by `threads` threads, of which this is number `me`.
template <class T>
__device__ __forceinline__ double sum_entries(const LossArgs& a, int64_t sample, int64_t begin,
                                              int64_t end, int me, int threads, bool whole) {
  const T inverse = T(1) / T(sigma_of(a, sample));
  double sum = 0.0;
  for (int64_t i = begin + int64_t(me) * kFour; i < end; i += int64_t(threads) * kFour) {
    Entries<T> entries;
    entries.load(a, sample, i, end, whole);
#pragma unroll
    for (int k = 0; k < kFour; ++k) {
      if (i + k < end) sum += double(entries.value(a, k, inverse));
    }
  }
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) short_loss_kernel(LossArgs a, int lanes, bool whole) {
  const int64_t each = kThreads / lanes;
  const int lane = int(threadIdx.x) % lanes;
  for (int64_t first = blockIdx.x * each; first < a.batch; first += gridDim.x * each) {
    const int64_t sample = first + threadIdx.x / lanes;
    const bool there = sample < a.batch;
    double sum = there ? sum_entries<T>(a, sample, 0, a.size, lane, lanes, whole) : 0.0;
    for (int step = lanes / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    }
    if (there && lane == 0) static_cast<T*>(a.loss)[sample] = T(sum);
  }
}

// One chunk a block; with one chunk a sample its sum is the loss.
template <class T>
__global__ void __launch_bounds__(kThreads)
    entry_loss_kernel(LossArgs a, int64_t chunks, bool whole) {
  for (int64_t item = blockIdx.x; item < a.batch * chunks; item += gridDim.x) {
    const int64_t sample = item / chunks, begin = item % chunks * kEntryChunk;
    const int64_t end = begin + kEntryChunk < a.size ? begin + kEntryChunk : a.size;
    const double sum =
        block_sum(sum_entries<T>(a, sample, begin, end, threadIdx.x, kThreads, whole));
    if (threadIdx.x > 0) continue;
    static_cast<T*>(chunks == 1 ? a.loss : a.scratch)[item] = T(sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) add_chunks_kernel(LossArgs a, int64_t chunks) {
  for (int64_t sample = blockIdx.x; sample < a.batch; sample += gridDim.x) {
    const T* parts = static_cast<const T*>(a.scratch) + sample * chunks;
    double sum = 0.0;
    for (int64_t k = threadIdx.x; k < chunks; k += kThreads) sum += double(parts[k]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) static_cast<T*>(a.loss)[sample] = T(sum);
  }
}

// A thread takes four entries of one point.
template <class T>
__global__ void __launch_bounds__(kThreads) entry_backward_kernel(LossArgs a, bool whole) {
  const int64_t across = ceil_div(a.size, kFour);
  const int64_t items = points_of(a.kind) * a.batch * across;
  for (int64_t item = thread_index(); item < items; item += grid_threads()) {
    const int64_t owner = item / across, i = item % across * kFour;
    const int64_t point = owner / a.batch, sample = owner % a.batch;
    const T inverse = T(1) / T(sigma_of(a, sample));
    const T g = static_cast<const T*>(a.grad)[sample * a.grad_stride];
    const bool scored = point < a.score_points;  // without it the clean point has a = 0
    const bool diagonal = a.kind == kD2smDiag || a.kind == kD2smDiagVr;
    T s[kFour] = {}, d[kFour] = {}, z[kFour];
    load_four(a.noise, 0, sample, i, a.size, whole, z);
    if (scored) load_four(a.score, point, sample, i, a.size, whole, s);
    if (diagonal) load_four(a.diag, point, sample, i, a.size, whole, d);
    const Coefficients<T> c = coefficients<T>(a.kind, point);
#pragma unroll
    for (int k = 0; k < kFour; ++k) {
      if (diagonal) {
        d[k] = diagonal_grad(c, s[k], d[k], z[k], inverse * inverse, g);
        s[k] = T(2) * s[k] * d[k];
      } else {
        s[k] = dsm_grad(point, s[k], z[k], inverse, g);
      }
    }
    const int64_t row = owner * a.size;
    if (diagonal) store_four(d, i, a.size, whole, static_cast<T*>(a.grad_diag) + row);
    if (scored) store_four(s, i, a.size, whole, static_cast<T*>(a.grad_score) + row);
  }
}

// Whether rows of what is given begin at multiples of 16 bytes.
template <class T>
bool whole_words(const LossArgs& a, bool backward) {
  const auto aligned = [](const void* data, int64_t point, int64_t batch) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && point % kWord<T> == 0 &&
           batch % kWord<T> == 0;
  };
  const auto view = [&](const View& v) { return aligned(v.data, v.point, v.batch); };
  return view(a.score) && view(a.diag) && view(a.noise) &&
         (!backward || (aligned(a.grad_score, 0, a.size) && aligned(a.grad_diag, 0, a.size)));
}

int64_t chunks_of(int64_t size) { return size <= kShort ? 1 : ceil_div(size, kEntryChunk); }

template <class T>
void run_loss(const LossArgs& a, Queue queue) {
  const bool whole = whole_words<T>(a, false);
  if (a.size <= kShort) {
    int lanes = 1;
    while (lanes < kWarp && lanes * kFour < a.size) lanes *= 2;
    launch("loss", short_loss_kernel<T>, ceil_div(a.batch, kThreads / lanes), queue, a, lanes,
           whole);
    return;
  }
  const int64_t chunks = chunks_of(a.size);
  launch("loss", entry_loss_kernel<T>, a.batch * chunks, queue, a, chunks, whole);
  if (chunks > 1) launch("loss", add_chunks_kernel<T>, a.batch, queue, a, chunks);
}

template <class T>
void run_backward(const LossArgs& a, Queue queue) {
  const int64_t items = points_of(a.kind) * a.batch * ceil_div(a.size, kFour);
  launch("loss_backward", entry_backward_kernel<T>, ceil_div(items, kThreads), queue, a,
         whole_words<T>(a, true));
}

}  // namespace

int64_t entrywise_scratch(int64_t batch, int64_t size) {
  return chunks_of(size) > 1 ? batch * chunks_of(size) : 0;
}

void entrywise_loss(const LossArgs& a, int dtype, Queue queue) {
  dtype == kFloat64 ? run_loss<double>(a, queue) : run_loss<float>(a, queue);
}

void entrywise_backward(const LossArgs& a, int dtype, Queue queue) {
  dtype == kFloat64 ? run_backward<double>(a, queue) : run_backward<float>(a, queue);
}

}  // namespace HOS_ISA
}  // namespace hos
