// diag(d) + U diag(w) U^T, as a dense matrix and as an operator, host and device.
#pragma once

#include "second_order_loss.h"

namespace hos {

struct LowRankArgs {
  int64_t batch, size, rank, columns;  // columns: right-hand sides of a product
  View diag, factor, v;                // v is indexed (batch, row, column)
  const void* sign;
  void* out;  // assemble: (B, D, D) with rows out_row, samples out_batch; product: (B, D, columns)
  int64_t out_batch, out_row;
  void* scratch;  // product on CUDA: matvec_scratch elements
};

inline namespace HOS_ISA {

// One entry, `inner` = sum_k U_ik w_k U_jk.
template <class T>
HOS_HD T hessian_entry(T inner, T d, bool on_diagonal) {
  return on_diagonal ? inner + d : inner;
}

}  // namespace HOS_ISA
}  // namespace hos
