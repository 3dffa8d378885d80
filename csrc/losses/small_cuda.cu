// Losses of low rank on CUDA for small samples, up to kSmallRank columns of U and kSmallSize rows:
// samples lie side by side in a warp. Forward: 1 to 32 lanes a sample, everything in registers;
// what backward needs is gathered in shared memory, for a block's share of it is one run of device
// memory. Backward: a thread a row of one point.

#include "losses/sums.cuh"

namespace hos {
inline namespace HOS_ISA {

namespace {

constexpr int64_t kSmallRank = 8, kSmallSize = 128;
constexpr int kSmallThreads = 64;

// Row i of V = [U, s] at one point, zeros up to kColumns; a score that is left out counts as 0.
template <class T, int kColumns>
__device__ __forceinline__ void load_row(const LossArgs& a, int64_t point, int64_t sample,
                                         int64_t i, T (&v)[kColumns]) {
  const T* u = place<T>(a.factor, point, sample, i);
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    v[k] = T(0);
    if (k < a.rank) v[k] = u[k * a.factor.column];
    if (k == a.rank && point < a.score_points) v[k] = at<T>(a.score, point, sample, i);
  }
}

template <class T>
__device__ __forceinline__ T lanes_sum(T value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
  }
  return value;
}

// `lanes` threads a sample; a sample beyond the last computes nothing.
template <class T, int kColumns>
__global__ void __launch_bounds__(kSmallThreads, 4) small_loss_kernel(LossArgs a, int lanes) {
  T* staged = shared_memory<T>();
  const int64_t points = points_of(a.kind), columns = a.rank + 1;
  const int64_t gram_points = gram_points_of(points), n = saved_size(a.kind, a.rank);
  const bool reduced = points == 3;
  const int64_t each = kSmallThreads / lanes;
  const int lane = int(threadIdx.x) % lanes;
  T* own = staged + threadIdx.x / lanes * n;
  for (int64_t first = blockIdx.x * each; first < a.batch; first += gridDim.x * each) {
    const int64_t sample = first + threadIdx.x / lanes;
    const bool there = sample < a.batch;
    const int64_t size = there ? a.size : 0;
    Parts parts = {};
    ColumnSums<T> sums[kColumns] = {};
    T norm = T(0), inner = T(0);
    for (int64_t i = lane; i < size; i += lanes) {
      const T z = at<T>(a.noise, 0, sample, i), d = at<T>(a.diag, 0, sample, i);
      const T minus = reduced ? at<T>(a.diag, 1, sample, i) : T(0);
      const T clean = reduced ? at<T>(a.diag, 2, sample, i) : T(0);
      add_diagonal(reduced, z, d, minus, clean, &norm, &inner);
      T v[3][kColumns] = {};
      load_row(a, 0, sample, i, v[0]);
      if (reduced) {
        load_row(a, 1, sample, i, v[1]);
        load_row(a, 2, sample, i, v[2]);
      }
#pragma unroll
      for (int k = 0; k < kColumns; ++k)
        sums[k].add(reduced, z, v[0][k], d, v[1][k], minus, v[2][k]);
    }
    norm = lanes_sum(norm, lanes);
    inner = lanes_sum(inner, lanes);
    T* projections = own + gram_points * columns * columns;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const double w = weight_of<T>(a.sign, a.rank, k);
      const T total = lanes_sum(sums[k].norm, lanes), entries = lanes_sum(sums[k].inner, lanes);
      const T up = lanes_sum(sums[k].up, lanes), down = lanes_sum(sums[k].down, lanes);
      const T base = lanes_sum(sums[k].base, lanes);
      if (k < columns && lane == 0) {
        finish_column(reduced, w, total, entries, up, down, base, columns, projections + k, &parts);
      }
    }
    for (int64_t point = 0; point < gram_points; ++point) {
      T gram[kColumns * (kColumns + 1) / 2] = {};
      for (int64_t i = lane; i < size; i += lanes) {
        T v[kColumns];
        load_row(a, point, sample, i, v);
#pragma unroll
        for (int l = 0; l < kColumns; ++l) {
#pragma unroll
          for (int k = 0; k <= l; ++k)
            gram[triangle(k, l)] = mul_add(v[k], v[l], gram[triangle(k, l)]);
        }
      }
      T* to = own + point * columns * columns;
#pragma unroll
      for (int l = 0; l < kColumns; ++l) {
#pragma unroll
        for (int k = 0; k <= l; ++k) {
          const T value = lanes_sum(gram[triangle(k, l)], lanes);
          if (l >= columns || lane > 0) continue;
          to[l * columns + k] = to[k * columns + l] = value;
          finish_gram(reduced, weight_of<T>(a.sign, a.rank, k), weight_of<T>(a.sign, a.rank, l),
                      value, k == l, &parts);
        }
      }
    }
    if (there && lane == 0) {
      static_cast<T*>(a.loss)[sample] =
          T(loss_value(reduced, parts.norm + double(norm), parts.inner + double(inner),
                       precision_of(a, sample)));
    }
    __syncthreads();
    const int64_t count = (a.batch - first < each ? a.batch - first : each) * n;
    T* saved = static_cast<T*>(a.saved) + first * n;
    for (int64_t k = threadIdx.x; k < count; k += kSmallThreads) saved[k] = staged[k];
    __syncthreads();
  }
}

template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 3)
    small_backward_kernel(LossArgs a) {
  const int64_t points = points_of(a.kind), columns = a.rank + 1;
  const int64_t gram_points = gram_points_of(points), n = saved_size(a.kind, a.rank);
  for (int64_t item = thread_index(); item < points * a.batch * a.size; item += grid_threads()) {
    const int64_t owner = item / a.size, i = item % a.size;
    const int64_t point = owner / a.batch, sample = owner % a.batch;
    const bool full = point < gram_points;
    const Coefficients<T> c = coefficients<T>(a.kind, point);
    const T g = static_cast<const T*>(a.grad)[sample * a.grad_stride];
    const T precision = T(precision_of(a, sample));
    const T z = at<T>(a.noise, 0, sample, i), d = at<T>(a.diag, point, sample, i);
    const T* saved = static_cast<const T*>(a.saved) + sample * n;
    const T* gram = saved + point * columns * columns;
    const T* projections = saved + gram_points * columns * columns + point * columns;
    T v[kColumns], norm = T(0);
    load_row(a, point, sample, i, v);
    T* to = const_cast<T*>(place<T>(a.grad_factor, point, sample, i));
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      if (k >= columns) break;
      const T w = weight_of<T>(a.sign, a.rank, k);
      const T by_own =
          full ? d * diag_weight(c, w, g) : gram_weight(c, T(0), w, w, true, precision, g);
      T product = z * noise_weight(c, projections[k], w, precision, g) + by_own * v[k];
      if (full) {
        norm = mul_add(w * v[k], v[k], norm);
#pragma unroll
        for (int l = 0; l < kColumns; ++l) {
          if (l >= columns) break;
          const T w_row = weight_of<T>(a.sign, a.rank, l);
          const T weight = gram_weight(c, gram[k * columns + l], w_row, w, l == k, precision, g);
          product = mul_add(v[l], weight, product);
        }
      }
      if (k < a.rank) {
        to[k * a.grad_factor.column] = product;
      } else if (point < a.score_points) {
        static_cast<T*>(a.grad_score)[item] = product;
      }
    }
    static_cast<T*>(a.grad_diag)[item] = diag_grad(c, d, norm, z, precision, g);
  }
}

// Lanes of a sample: about four rows each, and no more of `saved` than shared memory holds.
int lanes_of(const LossArgs& a) {
  int lanes = 1;
  while (lanes < kWarp && lanes * 4 < a.size) lanes *= 2;
  return lanes;
}

template <class T, int kColumns>
void run_loss(const LossArgs& a, Queue queue) {
  const int lanes = lanes_of(a);
  const int64_t each = kSmallThreads / lanes;
  const Grid grid(ceil_div(a.batch, each), kSmallThreads,
                  each * saved_size(a.kind, a.rank) * int64_t(sizeof(T)));
  launch("loss", small_loss_kernel<T, kColumns>, grid, queue, a, lanes);
}

template <class T, int kColumns>
void run_backward(const LossArgs& a, Queue queue) {
  const int64_t items = points_of(a.kind) * a.batch * a.size;
  launch("loss_backward", small_backward_kernel<T, kColumns>, ceil_div(items, kThreads), queue, a);
}

template <class T>
void loss_of_type(const LossArgs& a, Queue queue) {
  a.rank <= 2   ? run_loss<T, 3>(a, queue)
  : a.rank <= 4 ? run_loss<T, 5>(a, queue)
                : run_loss<T, kSmallRank + 1>(a, queue);
}

template <class T>
void backward_of_type(const LossArgs& a, Queue queue) {
  a.rank <= 2   ? run_backward<T, 3>(a, queue)
  : a.rank <= 4 ? run_backward<T, 5>(a, queue)
                : run_backward<T, kSmallRank + 1>(a, queue);
}

}  // namespace

bool is_small(int64_t size, int64_t rank) { return rank <= kSmallRank && size <= kSmallSize; }

void small_loss(const LossArgs& a, int dtype, Queue queue) {
  dtype == kFloat64 ? loss_of_type<double>(a, queue) : loss_of_type<float>(a, queue);
}

void small_backward(const LossArgs& a, int dtype, Queue queue) {
  dtype == kFloat64 ? backward_of_type<double>(a, queue) : backward_of_type<float>(a, queue);
}

}  // namespace HOS_ISA
}  // namespace hos
