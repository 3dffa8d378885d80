// Denoising score matching losses in closed form, host and device. Nothing of size D x D is formed:
// with V = [U, s], w = [sign, 1], psi = diag(d) + V diag(w) V^T and C = (I - z z^T) / sigma^2,
//   L    = A |psi|^2 + 2 B <C, psi>, summed over points
//   |psi|^2 = sum d^2 + 2 sum_k w_k sum_i d_i V_ik^2 + sum_kl w_k w_l G_kl^2,   G = V^T V
//   <C, psi> sigma^2 = sum d (1 - z^2) + sum_k w_k (G_kk - g_k^2),              g = V^T z
//   dL/dd = 2 diag(R), dL/dV = 4 R V diag(w),                                   R = A psi + B C
// (A, B): plain (1, 1); variance reduced (1/2, 1/2) at +, (1/2, 1/2) at -, (0, -1) at the clean
// point. There the inner product is taken from V+- - V0 before the products: it is a second
// difference divided by sigma^2, which float32 would otherwise lose.
#pragma once

#include "base/queue.h"
#include "base/view.h"

namespace hos {

enum LossKind : int { kDsm, kDsmVr, kD2sm, kD2smVr, kD2smDiag, kD2smDiagVr };
inline constexpr int kLossKinds = kD2smDiagVr + 1;
inline constexpr const char* kLossNames[kLossKinds] = {
    "dsm_loss", "dsm_vr_loss", "d2sm_loss", "d2sm_vr_loss", "d2sm_diag_loss", "d2sm_diag_vr_loss"};

struct LossArgs {
  int kind;
  int64_t batch, size, rank;  // B, D, r
  int64_t score_points;       // 3, or 2 where the score at the clean point is left out
  View score, diag, factor, noise;
  const double* sigmas;  // one a sample, or null
  double sigma;
  const void* sign;  // +-1 for each column of the factor, or null
  void* loss;        // (B,)
  void* saved;       // (B, saved_size)
  void* scratch;     // loss_scratch elements, forward alone
  const void* grad;  // (B,) incoming gradient
  int64_t grad_stride;
  void *grad_score, *grad_diag;  // dense, as (points, B, D)
  View grad_factor;
};

// Points at which a loss takes the score, and the diagonal and the factor where it has them.
HOS_HD int64_t points_of(int kind) {
  if (kind == kDsmVr) return 2;
  return kind == kD2smVr || kind == kD2smDiagVr ? 3 : 1;
}

HOS_HD bool has_diag(int kind) { return kind >= kD2sm; }

// The losses of low rank.
HOS_HD bool has_factor(int kind) { return kind == kD2sm || kind == kD2smVr; }

// Of those points, the ones whose Gram matrix V^T V enters.
HOS_HD int64_t gram_points_of(int64_t points) { return points == 3 ? 2 : 1; }

// What backward needs of a sample: Gram matrices, then a projection g for each point.
HOS_HD int64_t saved_size(int kind, int64_t rank) {
  const int64_t columns = rank + 1;
  if (kind == kD2sm) return columns * columns + columns;
  if (kind == kD2smVr) return 2 * columns * columns + 3 * columns;
  return 0;
}

inline namespace HOS_ISA {

// The kernels. `loss` returns 0, or 1 + the sample whose sigma is not a positive finite number; on
// CUDA always 0, for looking would wait. `loss_scratch`: elements of scratch that it needs.
int64_t loss(const LossArgs&, int dtype, Queue);
void loss_backward(const LossArgs&, int dtype, Queue);
int64_t loss_scratch(int kind, int64_t batch, int64_t size, int64_t rank);

HOS_HD double sigma_of(const LossArgs& a, int64_t sample) {
  return a.sigmas != nullptr ? a.sigmas[sample] : a.sigma;
}

HOS_HD double precision_of(const LossArgs& a, int64_t sample) {
  const double sigma = sigma_of(a, sample);
  return 1.0 / (sigma * sigma);
}

template <class T>
struct Coefficients {
  T a, b;
};

template <class T>
HOS_HD Coefficients<T> coefficients(int kind, int64_t point) {
  const bool reduced = kind == kD2smVr || kind == kD2smDiagVr;
  if (!reduced) return {T(1), T(1)};
  if (point < 2) return {T(0.5), T(0.5)};
  return {T(0), T(-1)};
}

// What row i of column k adds to |D+|^2 + |D-|^2 + 2 <V0, D+ + D->, D+- = V+- - V0; T may be a
// vector of columns.
template <class T>
HOS_HD T difference_entry(T plus, T minus, T clean) {
  const T dp = plus - clean, dm = minus - clean;
  return dp * (plus + clean) + dm * (minus + clean);
}

// sigma^2 <C, .> of a column: its summed entries less the squared projections on z (of D+, D- and
// V0; the plain loss has the first alone).
HOS_HD double column_inner(double w, double entries, double up, double down, double base) {
  return w * (entries - up * up - down * down - 2.0 * base * (up + down));
}

HOS_HD double loss_value(bool reduced, double norm, double inner, double precision) {
  return reduced ? 0.5 * norm + precision * inner : norm + 2.0 * precision * inner;
}

// dL/dV_ik = sum_l V_il gram_weight_lk + z_i noise_weight_k + d_i V_ik diag_weight_k, times the
// incoming gradient `g`; `precision` is 1 / sigma^2.
template <class T>
HOS_HD T gram_weight(Coefficients<T> c, T gram, T w_row, T w_column, bool same, T precision, T g) {
  return T(4) * g * w_column * (c.a * w_row * gram + (same ? c.b * precision : T(0)));
}

template <class T>
HOS_HD T noise_weight(Coefficients<T> c, T projection, T w_column, T precision, T g) {
  return T(-4) * g * w_column * c.b * precision * projection;
}

template <class T>
HOS_HD T diag_weight(Coefficients<T> c, T w_column, T g) {
  return T(4) * g * w_column * c.a;
}

// dL/dd_i, `row_norm` = sum_k w_k V_ik^2.
template <class T>
HOS_HD T diag_grad(Coefficients<T> c, T d, T row_norm, T z, T precision, T g) {
  return T(2) * g * (c.a * (d + row_norm) + c.b * (T(1) - z * z) * precision);
}

// One entry of Eq. 17 without |c|^2: q^2 + 2 q c, q = d + s^2.
template <class T>
HOS_HD T diagonal_entry(T s, T d, T z, T precision) {
  const T q = d + s * s;
  return q * (q + T(2) * (T(1) - z * z) * precision);
}

// One entry of its variance-reduced form; s0 and the terms it enters are left out with two scores.
template <class T>
HOS_HD T diagonal_vr_entry(T sp, T sm, T s0, T dp, T dm, T d0, T z, T precision, bool clean) {
  const T qp = dp + sp * sp, qm = dm + sm * sm;
  const T base = clean ? s0 : T(0);
  const T second = ((dp - d0) + (dm - d0)) + (sp - base) * (sp + base) + (sm - base) * (sm + base);
  return T(0.5) * (qp * qp + qm * qm) + second * (T(1) - z * z) * precision;
}

// dL/dd of one entry of the diagonal losses; dL/ds is 2 s times it.
template <class T>
HOS_HD T diagonal_grad(Coefficients<T> c, T s, T d, T z, T precision, T g) {
  return T(2) * g * (c.a * (d + s * s) + c.b * (T(1) - z * z) * precision);
}

// One entry of Eq. 3, and of Eq. 32 as s^2 + 2 (s - s_clean) z / sigma.
template <class T>
HOS_HD T dsm_entry(T s, T z, T inverse_sigma) {
  const T residual = mul_add(z, inverse_sigma, s);
  return residual * residual;
}

template <class T>
HOS_HD T dsm_vr_entry(T s, T clean, T z, T inverse_sigma) {
  return mul_add(T(2) * (s - clean), z * inverse_sigma, s * s);
}

// Their gradients; the second point is the clean one.
template <class T>
HOS_HD T dsm_grad(int64_t point, T s, T z, T inverse_sigma, T g) {
  const T target = z * inverse_sigma;
  return T(2) * g * (point == 0 ? s + target : -target);
}

}  // namespace HOS_ISA
}  // namespace hos
