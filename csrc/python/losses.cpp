// Losses, called from Python: by the checked way, and directly.

#include <memory>

#include "python/calls.h"
#include "python/direct.h"
#include "python/kernels.h"

namespace hos {

namespace {

struct LossCall {
  Queue queue;
  int dtype;
  bool stacked;
  LossArgs args{};
  Level sigma;

  // What forward and backward share: queue; kind; score, diag, factor and noise as ([points], B, D)
  // and ([points], B, D, r), or None, with dense rows; sigma; sign (r,) or None; saved, (B, n).
  explicit LossCall(Arguments& in) {
    queue = in.queue();
    args.kind = in.integer("kind");
    stacked = points_of(args.kind) > 1;
    const Seen score = in.tensor("score"), diag = in.tensor("diag"), factor = in.tensor("factor");
    const Seen noise = in.tensor("noise");
    dtype = noise.dtype;
    args.batch = noise.shape[0];
    args.size = noise.shape[1];
    args.rank = factor.dims > 0 ? factor.shape[factor.dims - 1] : 0;
    args.score_points = stacked ? score.shape[0] : 1;
    args.score = rows_of(score, stacked);
    args.diag = rows_of(diag, stacked);
    args.factor = columns_of(factor, stacked);
    args.noise = rows_of(noise, false);
    sigma.take(in.object("sigma"), args.batch);
    args.sigma = sigma.number();
    args.sigmas = sigma.each();
    args.sign = in.tensor("sign").data;
    args.saved = in.tensor("saved").data;
  }
  LossCall() = default;
  LossCall(const LossCall&) = delete;
  LossCall& operator=(const LossCall&) = delete;
};

}  // namespace

// The arguments above, where the losses go, and scratch or None: 0, or 1 + the sample with a bad
// sigma.
PyObject* loss_call(Arguments& in) {
  LossCall c(in);
  c.args.loss = in.tensor("loss").data;
  c.args.scratch = in.tensor("scratch").data;
  in.done();
  int64_t bad;
  {
    const py::gil_scoped_release unlocked;
    bad = kernels(c.queue).loss(c.args, c.dtype, c.queue);
  }
  return PyLong_FromLongLong(bad);
}

// The arguments above, the incoming gradient, and where those of score, diag and factor go, or
// None.
PyObject* loss_backward_call(Arguments& in) {
  LossCall c(in);
  const Seen grad = in.tensor("grad");
  c.args.grad = grad.data;
  c.args.grad_stride = grad.strides[0];
  c.args.grad_score = in.tensor("grad_score").data;
  c.args.grad_diag = in.tensor("grad_diag").data;
  c.args.grad_factor = columns_of(in.tensor("grad_factor"), c.stacked);
  in.done();
  {
    const py::gil_scoped_release unlocked;
    kernels(c.queue).loss_backward(c.args, c.dtype, c.queue);
  }
  return none();
}

PyObject* loss_scratch_call(Arguments& in) {
  const Queue queue = in.queue();
  const int kind = in.integer("kind");
  const int64_t batch = in.size("batch"), size = in.size("size"), rank = in.size("rank");
  in.done();
  return PyLong_FromLongLong(kernels(queue).loss_scratch(kind, batch, size, rank));
}

namespace {

struct DirectLoss {
  int kind;
  PyObject *score, *diag, *factor, *noise, *sigma, *sign;

  explicit DirectLoss(Arguments& in) {
    kind = in.integer("kind");
    score = in.object("score");
    diag = in.object("diag");
    factor = in.object("factor");
    noise = in.object("noise");
    sigma = in.object("sigma");
    sign = in.object("sign");
    in.done();
  }
};

// Whether all is plain, agrees, and lies as the kernel takes it: then `call` holds it.
Verdict judge(const DirectLoss& in, LossCall* call) {
  const bool low_rank = in.factor != Py_None;
  if (in.score == Py_None || in.noise == Py_None || in.sign != Py_None ||
      (in.diag != Py_None) != has_diag(in.kind) || (low_rank && !has_factor(in.kind))) {
    return kRefused;
  }
  PyObject* const tensors[] = {in.score, in.diag, in.factor};
  if (!is_plain(in.noise) || !is_plain(in.score) || !is_plain(in.diag) || !is_plain(in.factor)) {
    return kRefused;
  }
  const Verdict verdict = observed(tensors, 3);
  if (verdict == kRefused || requires_grad(in.noise)) return kRefused;
  LossArgs& a = call->args;
  const int64_t points = points_of(in.kind);
  const int lead = points > 1 ? 1 : 0;
  Seen noise, score, diag{}, factor{};
  if (!read_memory(in.noise, &noise) || noise.dtype > kFloat64 || noise.dims < 2 ||
      noise.count() == 0 || !noise.dense(1) || (verdict == kTracked && noise.dims != 2)) {
    return kRefused;
  }
  const auto fits = [&](PyObject* t, Seen* seen, int64_t least) {
    return read_memory(t, seen) && seen->like(noise, lead) && seen->dense(lead + 1) &&
           (lead == 0 || (seen->shape[0] >= least && seen->shape[0] <= points));
  };
  if (!fits(in.score, &score, points == 3 ? 2 : points)) return kRefused;
  if (in.diag != Py_None && !fits(in.diag, &diag, points)) return kRefused;
  a.batch = noise.shape[0];
  a.size = noise.count() / a.batch;
  if (low_rank) {
    const int64_t *shape = factor.shape + lead, *strides = factor.strides + lead;
    if (!read_memory(in.factor, &factor) || factor.dtype != noise.dtype ||
        factor.dims != 3 + lead || (lead == 1 && factor.shape[0] != points) ||
        shape[0] != a.batch || shape[1] != a.size || shape[2] == 0 ||
        (strides[1] != 1 && strides[2] != 1)) {
      return kRefused;
    }
    a.rank = shape[2];
  }
  call->dtype = noise.dtype;
  a.kind = in.kind;
  a.score_points = lead == 1 ? score.shape[0] : 1;
  a.score = rows_of(score, lead == 1);
  a.diag = rows_of(diag, lead == 1);
  a.factor = columns_of(factor, lead == 1);
  a.noise = rows_of(noise, false);
  if (!read_level(in.sigma, a.batch, &call->sigma)) return kRefused;
  a.sigma = call->sigma.number();
  a.sigmas = call->sigma.each();
  return verdict;
}

}  // namespace

// kind, score, diag, factor, noise, sigma, sign: the losses (B,); True where all is plain, of (B,
// D), but a gradient is wanted; None for what is refused.
PyObject* direct_loss_call(Arguments& arguments) {
  const DirectLoss in(arguments);
  LossCall call;
  LossArgs& a = call.args;
  const Verdict verdict = verdict_of([&] { return judge(in, &call); });
  if (verdict == kRefused) return none();
  if (verdict == kTracked) return py::bool_(true).release().ptr();
  const py::object batch = taken(PyLong_FromLongLong(a.batch));
  py::object out = taken(PyObject_CallMethodOneArg(in.noise, names.new_empty, batch.ptr()));
  a.loss = read(out.ptr()).data;
  const int64_t bytes = a.batch * saved_size(a.kind, a.rank) * kDTypeBytes[call.dtype];
  const std::unique_ptr<char[]> saved(new char[size_t(bytes)]);  // no backward will ask for it
  a.saved = saved.get();
  run_direct(points_of(a.kind) * a.batch * a.size * (a.rank + 1),
             [&](Queue queue) { cpu_kernels().loss(a, call.dtype, queue); });
  return out.release().ptr();
}

}  // namespace hos
