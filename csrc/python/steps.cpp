// Steps, called from Python: by the checked way, and directly.

#include "python/calls.h"
#include "python/direct.h"
#include "python/kernels.h"

namespace hos {

namespace {

struct StepCall {
  Queue queue;
  int dtype;
  StepArgs args{};
  Level step_size;

  // What forward and backward share: queue; step_size; seed and offset of stream 0; first, the
  // global index of row 0; curvature; score, diag and noise or None, all (B, D) with dense rows.
  explicit StepCall(Arguments& in) {
    queue = in.queue();
    PyObject* level = in.object("step_size");
    const Counter seed = in.counter("seed");
    Counter offset;
    args.seed = seed.number;
    args.tag = in.tag(0, &offset);
    args.seed_pointer = seed.pointer;
    args.offset_pointer = offset.pointer;
    const uint64_t first = in.bits("first");
    args.curvature = in.integer("curvature");
    const Seen score = in.tensor("score"), diag = in.tensor("diag"), noise = in.tensor("noise");
    dtype = score.dtype;
    args.rows = score.shape[0];
    args.size = score.shape[1];
    args.start = first * uint64_t(args.size);
    args.score = score.data;
    args.score_row = score.strides[0];
    args.diag = diag.data;
    args.diag_row = diag.strides[0];
    args.noise = noise.data;
    args.noise_row = noise.strides[0];
    set(level);
  }
  StepCall() = default;
  StepCall(const StepCall&) = delete;
  StepCall& operator=(const StepCall&) = delete;

  void set(PyObject* level) {
    step_size.take(level, args.rows);
    args.step_size = step_size.number();
    args.step_sizes = step_size.each();
  }
};

}  // namespace

// The arguments above, x and out: 0, or 1 + the row with a bad step size.
PyObject* step_call(Arguments& in) {
  StepCall c(in);
  const Seen x = in.tensor("x"), out = in.tensor("out");
  c.args.x = x.data;
  c.args.x_row = x.strides[0];
  c.args.out = out.data;
  c.args.out_row = out.strides[0];
  in.done();
  int64_t bad;
  {
    const py::gil_scoped_release unlocked;
    bad = kernels(c.queue).step(c.args, c.dtype, c.queue);
  }
  return PyLong_FromLongLong(bad);
}

// The arguments above, the incoming gradient, and where those of score, diag and noise go, dense,
// or None.
PyObject* step_backward_call(Arguments& in) {
  StepCall c(in);
  const Seen grad = in.tensor("grad");
  c.args.grad = grad.data;
  c.args.grad_row = grad.strides[0];
  c.args.grad_score = in.tensor("grad_score").data;
  c.args.grad_diag = in.tensor("grad_diag").data;
  c.args.grad_noise = in.tensor("grad_noise").data;
  in.done();
  {
    const py::gil_scoped_release unlocked;
    kernels(c.queue).step_backward(c.args, c.dtype, c.queue);
  }
  return none();
}

namespace {

struct DirectStep {
  enum { kX, kScore, kDiag, kNoise, kOut, kTensors };
  PyObject* tensors[kTensors];
  PyObject *step_size, *seed, *offset, *first, *curvature;

  explicit DirectStep(Arguments& in) {
    tensors[kX] = in.object("x");
    tensors[kScore] = in.object("score");
    tensors[kDiag] = in.object("diag");
    tensors[kNoise] = in.object("noise");
    tensors[kOut] = in.object("out");
    step_size = in.object("step_size");
    seed = in.object("seed");
    offset = in.object("offset");
    first = in.object("first");
    curvature = in.object("curvature");
    in.done();
  }
};

// Dense tensors of one size with the same memory, or with none in common.
bool same_or_apart(const char* a, const char* b, int64_t bytes) {
  return a == b || a + bytes <= b || b + bytes <= a;
}

// Whether all is plain, agrees, and lies as the kernel takes it: then `call` holds it.
Verdict judge(const DirectStep& in, StepCall* call) {
  if (in.tensors[DirectStep::kX] == Py_None || in.tensors[DirectStep::kScore] == Py_None) {
    return kRefused;
  }
  for (PyObject* t : in.tensors) {
    if (!is_plain(t)) return kRefused;
  }
  const Verdict verdict = observed(in.tensors, DirectStep::kTensors);
  if (verdict == kRefused) return kRefused;
  Seen seen[DirectStep::kTensors] = {};
  const Seen& x = seen[DirectStep::kX];
  for (int i = 0; i < DirectStep::kTensors; ++i) {
    if (in.tensors[i] == Py_None) continue;
    if (!read_memory(in.tensors[i], &seen[i]) || !seen[i].dense() || !seen[i].like(x)) {
      return kRefused;
    }
  }
  const int64_t count = x.count();
  char* out = seen[DirectStep::kOut].data;
  if (x.dims < 2 || count == 0) return kRefused;
  if (verdict == kTracked && (x.dims != 2 || out != nullptr)) return kRefused;
  for (int i = 0; i < DirectStep::kOut && out != nullptr; ++i) {
    const bool given = seen[i].data != nullptr;
    if (given && !same_or_apart(seen[i].data, out, count * kDTypeBytes[x.dtype])) return kRefused;
  }
  StepArgs& a = call->args;
  call->dtype = x.dtype;
  a.rows = x.shape[0];
  a.size = count / a.rows;
  a.x = x.data;
  a.score = seen[DirectStep::kScore].data;
  a.diag = seen[DirectStep::kDiag].data;
  a.noise = seen[DirectStep::kNoise].data;
  a.out = out;
  a.x_row = a.score_row = a.diag_row = a.noise_row = a.out_row = a.size;
  uint64_t first, end, curvature;
  if (!read_counter(in.first, 63, &first) || !read_counter(in.offset, 56, &a.tag) ||
      !read_counter(in.curvature, 63, &curvature) || curvature > uint64_t(kRaw) ||
      __builtin_mul_overflow(first + uint64_t(a.rows), uint64_t(a.size), &end)) {
    return kRefused;
  }
  a.start = first * uint64_t(a.size);
  a.curvature = int(curvature);
  const bool keyed = in.seed != Py_None;
  if (keyed && (a.noise != nullptr || !read_counter(in.seed, 64, &a.seed))) return kRefused;
  if (!read_level(in.step_size, a.rows, &call->step_size)) return kRefused;
  a.step_size = call->step_size.number();
  a.step_sizes = call->step_size.each();
  return verdict;
}

}  // namespace

// x, score, diag, noise, out, step_size, seed, offset, first, curvature: the new state; True where
// all is plain, of (B, D), but a gradient is wanted; None for what is refused.
PyObject* direct_step_call(Arguments& arguments) {
  const DirectStep in(arguments);
  StepCall call;
  StepArgs& a = call.args;
  const Verdict verdict = verdict_of([&] { return judge(in, &call); });
  if (verdict == kRefused) return none();
  if (verdict == kTracked) return py::bool_(true).release().ptr();
  if (a.noise == nullptr && in.seed == Py_None) {
    a.seed = py::cast<uint64_t>(taken(PyObject_CallNoArgs(torch.fresh_seed)));
  }
  py::object out;
  PyObject* given = in.tensors[DirectStep::kOut];
  if (given != Py_None) {
    out = py::reinterpret_borrow<py::object>(given);
    taken(PyObject_CallOneArg(torch.increment_version, given));  // for autograd to see
  } else {
    out = taken(PyObject_CallOneArg(torch.empty_like, in.tensors[DirectStep::kX]));
    a.out = read(out.ptr()).data;
  }
  run_direct(a.rows * a.size, [&](Queue queue) { cpu_kernels().step(a, call.dtype, queue); });
  return out.release().ptr();
}

}  // namespace hos
