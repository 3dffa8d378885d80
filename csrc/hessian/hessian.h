// diag(d) + U diag(w) U^T, as a dense matrix and as an operator, host and device.
#pragma once

#include "base/queue.h"
#include "base/view.h"

namespace hos {

struct HessianArgs {
  int64_t batch, size, rank, columns;  // columns: right-hand sides of a product
  View diag, factor, v;                // v is indexed (batch, row, column)
  const void* sign;
  void* out;  // assemble: (B, D, D) with rows out_row, samples out_batch; product: (B, D, columns)
  int64_t out_batch, out_row;
  void* scratch;  // product: matvec_scratch elements
};

inline namespace HOS_ISA {

// The kernels. `matvec_scratch`: elements of scratch that a product needs.
void assemble(const HessianArgs&, int dtype, Queue);
void matvec(const HessianArgs&, int dtype, Queue);
int64_t matvec_scratch(int64_t batch, int64_t size, int64_t rank, int64_t columns);

// One entry, `inner` = sum_k U_ik w_k U_jk.
template <class T>
HOS_HD T hessian_entry(T inner, T d, bool on_diagonal) {
  return on_diagonal ? inner + d : inner;
}

}  // namespace HOS_ISA
}  // namespace hos
