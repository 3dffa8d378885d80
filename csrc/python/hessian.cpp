// Low-rank Hessians, called from Python.

#include "python/calls.h"
#include "python/kernels.h"

namespace hos {

namespace {

struct HessianCall {
  Queue queue;
  int dtype;
  HessianArgs args{};

  // queue; diag (B, D); factor (B, D, r); sign (r,) or None; out.
  explicit HessianCall(Arguments& in) {
    queue = in.queue();
    const Seen diag = in.tensor("diag"), factor = in.tensor("factor");
    dtype = diag.dtype;
    args.batch = factor.shape[0];
    args.size = factor.shape[1];
    args.rank = factor.shape[2];
    args.diag = rows_of(diag, false);
    args.factor = columns_of(factor, false);
    args.sign = in.tensor("sign").data;
    const Seen out = in.tensor("out");
    args.out = out.data;
    args.out_batch = out.strides[0];
    args.out_row = out.strides[1];
  }
};

}  // namespace

// The arguments above; out (B, D, D) with contiguous rows.
PyObject* assemble_call(Arguments& in) {
  const HessianCall c(in);
  in.done();
  {
    const py::gil_scoped_release unlocked;
    kernels(c.queue).assemble(c.args, c.dtype, c.queue);
  }
  return none();
}

// The arguments above; v (B, D, columns); out as v, dense; scratch or None.
PyObject* matvec_call(Arguments& in) {
  HessianCall c(in);
  const Seen v = in.tensor("v");
  c.args.v = columns_of(v, false);
  c.args.columns = v.shape[2];
  c.args.scratch = in.tensor("scratch").data;
  in.done();
  {
    const py::gil_scoped_release unlocked;
    kernels(c.queue).matvec(c.args, c.dtype, c.queue);
  }
  return none();
}

PyObject* matvec_scratch_call(Arguments& in) {
  const Queue queue = in.queue();
  const int64_t batch = in.size("batch"), size = in.size("size"), rank = in.size("rank");
  const int64_t columns = in.size("columns");
  in.done();
  return PyLong_FromLongLong(kernels(queue).matvec_scratch(batch, size, rank, columns));
}

}  // namespace hos
