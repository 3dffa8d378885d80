// Steps and losses, called with tensors: memory, shapes and strides are read here (tensor.h), which
// costs less than to pass them one by one. direct_step also checks its arguments, and refuses what
// is not plain without an error: hos_ext/ops.py checks that and explains.

#include "call.h"

#include <cmath>
#include <exception>
#include <string>
#include <vector>

#include "tensor.h"

namespace hos {

namespace {

constexpr int64_t kBrief = 16 * 1024;  // elements below which a step keeps the GIL and one thread

// -------------------------------------------------------------------------------------- arguments

// The arguments of a call, taken one after the other.
class Arguments {
 public:
  Arguments(PyObject* const* first, Py_ssize_t count, int expected) : next_(first) {
    if (count != expected) {
      throw py::type_error("expected " + std::to_string(expected) + " arguments, got " +
                           std::to_string(count));
    }
  }
  PyObject* object() { return *next_++; }
  int integer() { return py::handle(object()).cast<int>(); }
  uint64_t bits() {  // of an int of any sign, modulo 2^64
    const uint64_t value = PyLong_AsUnsignedLongLongMask(object());
    if (value == uint64_t(-1) && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
  }
  Seen tensor() {  // no data for None
    PyObject* t = object();
    return t == Py_None ? Seen{} : read(t);
  }

 private:
  PyObject* const* next_;
};

// sigma or step_size: a number for all rows, or one for each, in double precision.
class Values {
 public:
  void take(PyObject* value, int64_t rows) {
    if (PyFloat_Check(value)) {
      number_ = PyFloat_AS_DOUBLE(value);
      return;
    }
    take(read(value), rows);
  }
  void take(const Seen& seen, int64_t rows) {
    const int64_t stride = seen.dims == 1 ? seen.strides[0] : 0;
    if (seen.dims > 1 || (seen.dims == 1 && seen.shape[0] != rows) ||
        (seen.dtype != kFloat64 && !(seen.cpu && seen.dtype == kFloat32))) {
      throw std::runtime_error("hos_ext: values of a shape or dtype that no kernel reads");
    }
    each_ = reinterpret_cast<const double*>(seen.data);
    if (!seen.cpu || (seen.dtype == kFloat64 && stride == 1)) return;
    held_.reserve(size_t(rows));
    for (int64_t row = 0; row < rows; ++row) {
      const char* at = seen.data + row * stride * kWidths[seen.dtype];
      held_.push_back(seen.dtype == kFloat64 ? *reinterpret_cast<const double*>(at)
                                             : double(*reinterpret_cast<const float*>(at)));
    }
    each_ = held_.data();
  }
  double number() const { return number_; }
  const double* each() const { return each_; }

 private:
  double number_ = 0.0;
  const double* each_ = nullptr;
  std::vector<double> held_;
};

View view(const Seen& t, bool stacked) {
  if (t.dims == 0) return {};
  const int64_t* inner = t.strides + (stacked ? 1 : 0);
  const bool factor = t.dims == (stacked ? 4 : 3);
  return {t.data, stacked ? t.strides[0] : 0, inner[0], factor ? inner[1] : 1,
          factor ? inner[2] : 1};
}

template <class Body>
PyObject* guarded(const Body& body) {
  try {
    return body();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// ------------------------------------------------------------------------------------------ steps

struct StepCall {
  int device;
  uint64_t queue;
  int dtype;
  StepArgs args{};
  Values step_sizes;

  // (device, queue, step_size, seed, offset, seed_address, offset_address, first, curvature, x or
  // its gradient, score, diag, noise), all (B, D) with contiguous rows.
  void take(Arguments& in, const void*& lead, int64_t& lead_row) {
    device = in.integer();
    queue = in.bits();
    PyObject* step_size = in.object();
    args.seed = in.bits();
    args.tag = in.bits();
    args.seed_pointer = pointer<const uint64_t>(in.bits());
    args.offset_pointer = pointer<const uint64_t>(in.bits());
    args.start = in.bits();
    args.curvature = in.integer();
    const Seen x = in.tensor(), score = in.tensor(), diag = in.tensor(), noise = in.tensor();
    dtype = x.dtype;
    args.rows = x.shape[0];
    args.size = x.shape[1];
    args.start *= uint64_t(args.size);
    lead = x.data;
    lead_row = x.strides[0];
    args.score = score.data;
    args.score_row = score.strides[0];
    args.diag = diag.data;
    args.diag_row = diag.strides[0];
    args.noise = noise.data;
    args.noise_row = noise.strides[0];
    step_sizes.take(step_size, args.rows);
    args.step_size = step_sizes.number();
    args.step_sizes = step_sizes.each();
  }
};

// The arguments above and `out`: 0, or 1 + the row with a bad step size.
PyObject* step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded([&] {
    Arguments in(args, count, 14);
    StepCall c;
    StepArgs& a = c.args;
    c.take(in, a.x, a.x_row);
    const Seen out = in.tensor();
    a.out = out.data;
    a.out_row = out.strides[0];
    return PyLong_FromLongLong(run(
        c.device, c.queue, [&](int threads) { return kernels().step(a, c.dtype, threads); },
        HOS_ON_CUDA(step_cuda(a, c.dtype, launch))));
  });
}

// The arguments above, then where the gradients of score, diag and noise go, dense, or None.
PyObject* step_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded([&] {
    Arguments in(args, count, 16);
    StepCall c;
    StepArgs& a = c.args;
    c.take(in, a.grad, a.grad_row);
    a.grad_score = in.tensor().data;
    a.grad_diag = in.tensor().data;
    a.grad_noise = in.tensor().data;
    run(
        c.device, c.queue,
        [&](int threads) {
          kernels().step_backward(a, c.dtype, threads);
          return int64_t(0);
        },
        HOS_ON_CUDA(step_backward_cuda(a, c.dtype, launch)));
    return py::none().release().ptr();
  });
}

// ------------------------------------------------------------------------------------ direct steps

enum Argument { kX, kScore, kDiag, kNoise, kOut, kStepSize, kSeed, kOffset, kFirst, kCurvature };
constexpr int kTensors = kOut + 1, kArguments = kCurvature + 1;

// A torch.Tensor and no subclass, whose code might want to see the call.
bool plain(PyObject* t) { return Py_TYPE(t) == reinterpret_cast<PyTypeObject*>(torch.tensor); }

// On the CPU, without a lazy minus sign.
bool in_memory(PyObject* t, const Seen& seen) {
  return seen.cpu && seen.dtype >= 0 && !is_true(PyObject_CallMethodNoArgs(t, names->is_neg));
}

// Whether the kernel may run at once, or only what autograd records.
enum Verdict { kRefused, kDirect, kTracked };

// kRefused: a transform, tracing or a dispatch mode is at work.
Verdict observed(PyObject* const* tensors) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(torch.watchers); ++i) {
    if (is_true(PyObject_CallNoArgs(PyTuple_GET_ITEM(torch.watchers, i)))) return kRefused;
  }
  if (!is_true(PyObject_CallNoArgs(torch.grad_enabled))) return kDirect;
  for (int i = 0; i < kTensors; ++i) {
    if (tensors[i] != Py_None && is_true(PyObject_GetAttr(tensors[i], names->requires_grad))) {
      return kTracked;
    }
  }
  return kDirect;
}

// An int below 2^bits, and no bool.
bool read_counter(PyObject* value, int bits, uint64_t* out) {
  if (!PyLong_CheckExact(value)) return false;
  *out = PyLong_AsUnsignedLongLong(value);
  if (*out == uint64_t(-1) && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return bits == 64 || *out >> bits == 0;
}

// A positive number, or a plain tensor without gradient that holds such.
bool read_step_size(PyObject* value, StepCall* call) {
  const bool number = PyFloat_CheckExact(value);
  StepArgs& a = call->args;
  if (!number) {
    if (!plain(value)) return false;
    const Seen seen = read(value);
    if (!in_memory(value, seen) || seen.dtype > kFloat64 || seen.dims > 1 ||
        (seen.dims == 1 && seen.shape[0] != a.rows) ||
        is_true(PyObject_GetAttr(value, names->requires_grad))) {
      return false;
    }
    call->step_sizes.take(seen, a.rows);
  } else {
    call->step_sizes.take(value, a.rows);
  }
  a.step_size = call->step_sizes.number();
  a.step_sizes = call->step_sizes.each();
  for (int64_t row = 0; row < (number ? 1 : a.rows); ++row) {
    const double h = number ? a.step_size : a.step_sizes[row];
    if (!(h > 0.0 && std::isfinite(h))) return false;
  }
  return true;
}

// Contiguous tensors of one size with the same memory, or with none in common.
bool same_or_apart(const char* a, const char* b, int64_t bytes) {
  return a == b || a + bytes <= b || b + bytes <= a;
}

// What is plain, right and as the kernel takes it.
Verdict judge(PyObject* const* args, StepCall* call) {
  for (int i = 0; i < kTensors; ++i) {
    if (!plain(args[i]) && (i < kDiag || args[i] != Py_None)) return kRefused;
  }
  const Verdict verdict = observed(args);
  if (verdict == kRefused) return kRefused;
  Seen seen[kTensors] = {};
  const Seen& x = seen[kX];
  for (int i = 0; i < kTensors; ++i) {
    if (args[i] == Py_None) continue;
    seen[i] = read(args[i]);
    if (!in_memory(args[i], seen[i]) || !seen[i].contiguous() || !seen[i].like(x)) return kRefused;
  }
  const int64_t count = x.count();
  const bool flat = x.dims == 2 && args[kOut] == Py_None;
  if (x.dims < 2 || count == 0 || (verdict == kTracked && !flat)) return kRefused;
  for (int i = 0; i < kOut && seen[kOut].data != nullptr; ++i) {
    const int64_t bytes = count * kWidths[x.dtype];
    if (seen[i].data != nullptr && !same_or_apart(seen[i].data, seen[kOut].data, bytes)) {
      return kRefused;
    }
  }
  StepArgs& a = call->args;
  call->dtype = x.dtype;
  a.rows = x.shape[0];
  a.size = count / a.rows;
  a.x = x.data;
  a.score = seen[kScore].data;
  a.diag = seen[kDiag].data;
  a.noise = seen[kNoise].data;
  a.out = seen[kOut].data;
  a.x_row = a.score_row = a.diag_row = a.noise_row = a.out_row = a.size;
  uint64_t first, end, curvature;
  if (!read_counter(args[kFirst], 63, &first) || !read_counter(args[kOffset], 56, &a.tag) ||
      !read_counter(args[kCurvature], 63, &curvature) || curvature > uint64_t(kRaw) ||
      __builtin_mul_overflow(first + uint64_t(a.rows), uint64_t(a.size), &end)) {
    return kRefused;
  }
  a.start = first * uint64_t(a.size);
  a.curvature = int(curvature);
  const bool drawn = a.noise == nullptr;
  const bool keyed = args[kSeed] != Py_None;
  if (keyed && (!drawn || !read_counter(args[kSeed], 64, &a.seed))) return kRefused;
  return read_step_size(args[kStepSize], call) ? verdict : kRefused;
}

Verdict verdict_on(PyObject* const* args, StepCall* call) {
  try {
    return judge(args, call);
  } catch (const std::exception&) {  // torch has no address for it, or an int is out of range
    return kRefused;
  }
}

// (x, score, diag, noise, out, step_size, seed, offset, first, curvature): the new state; True
// where a gradient is wanted and all else is right; None for what is refused.
PyObject* direct_step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded([&] {
    Arguments in(args, count, kArguments);
    StepCall call;
    StepArgs& a = call.args;
    const Verdict verdict = verdict_on(args, &call);
    if (verdict == kRefused) return py::none().release().ptr();
    if (verdict == kTracked) return py::bool_(true).release().ptr();
    if (a.noise == nullptr && args[kSeed] == Py_None) {
      a.seed = py::cast<uint64_t>(taken(PyObject_CallNoArgs(torch.fresh_seed)));
    }
    py::object out;
    if (a.out != nullptr) {
      out = py::reinterpret_borrow<py::object>(args[kOut]);
      taken(PyObject_CallOneArg(torch.increment_version, args[kOut]));  // for autograd to see
    } else {
      out = taken(PyObject_CallOneArg(torch.empty_like, args[kX]));
      a.out = read(out.ptr()).data;
    }
    if (a.rows * a.size < kBrief) {
      kernels().step(a, call.dtype, 1);
    } else {
      const int threads = py::cast<int>(taken(PyObject_CallNoArgs(torch.threads)));
      const py::gil_scoped_release unlocked;
      kernels().step(a, call.dtype, threads);
    }
    return out.release().ptr();
  });
}

// ----------------------------------------------------------------------------------------- losses

struct LossCall {
  int device;
  uint64_t queue;
  int dtype;
  bool stacked;
  LossArgs args{};
  Values sigmas;

  // (device, queue, kind, score, diag, factor, noise, sigma, sign, saved).
  explicit LossCall(Arguments& in) {
    device = in.integer();
    queue = in.bits();
    args.kind = in.integer();
    stacked = points_of(args.kind) > 1;
    const Seen score = in.tensor(), diag = in.tensor(), factor = in.tensor(), noise = in.tensor();
    dtype = noise.dtype;
    args.batch = noise.shape[0];
    args.size = noise.shape[1];
    args.rank = factor.dims > 0 ? factor.shape[factor.dims - 1] : 0;
    args.score_points = stacked ? score.shape[0] : 1;
    args.score = view(score, stacked);
    args.diag = view(diag, stacked);
    args.factor = view(factor, stacked);
    args.noise = view(noise, false);
    sigmas.take(in.object(), args.batch);
    args.sigma = sigmas.number();
    args.sigmas = sigmas.each();
    args.sign = in.tensor().data;
    args.saved = in.tensor().data;
  }
};

// The arguments above, then where the losses go, and scratch on a GPU or None: 0, or 1 + the sample
// with a bad sigma.
PyObject* loss(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded([&] {
    Arguments in(args, count, 12);
    LossCall c(in);
    LossArgs& a = c.args;
    a.loss = in.tensor().data;
    a.scratch = in.tensor().data;
    return PyLong_FromLongLong(run(
        c.device, c.queue, [&](int threads) { return kernels().loss(a, c.dtype, threads); },
        HOS_ON_CUDA(loss_cuda(a, c.dtype, launch))));
  });
}

// The arguments above, then the incoming gradient and where those of score, diag and factor go.
PyObject* loss_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded([&] {
    Arguments in(args, count, 14);
    LossCall c(in);
    LossArgs& a = c.args;
    const Seen grad = in.tensor();
    a.grad = grad.data;
    a.grad_stride = grad.strides[0];
    a.grad_score = in.tensor().data;
    a.grad_diag = in.tensor().data;
    a.grad_factor = view(in.tensor(), c.stacked);
    run(
        c.device, c.queue,
        [&](int threads) {
          kernels().loss_backward(a, c.dtype, threads);
          return int64_t(0);
        },
        HOS_ON_CUDA(loss_backward_cuda(a, c.dtype, launch)));
    return py::none().release().ptr();
  });
}

// ---------------------------------------------------------------------------------------- module

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"step", fast(&step), METH_FASTCALL, nullptr},
    {"step_backward", fast(&step_backward), METH_FASTCALL, nullptr},
    {"direct_step", fast(&direct_step), METH_FASTCALL, nullptr},
    {"loss", fast(&loss), METH_FASTCALL, nullptr},
    {"loss_backward", fast(&loss_backward), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

// The exchange interface in a capsule, or an earlier one that it leads to; null for None.
const DlExchange* exchange_of(const py::object& capsule) {
  if (capsule.is_none()) return nullptr;
  const void* found = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (found == nullptr) throw py::error_already_set();
  const DlExchange* exchange = static_cast<const DlExchange*>(found);
  while (exchange != nullptr && exchange->major != 1) exchange = exchange->previous;
  return exchange == nullptr || exchange->read == nullptr ? nullptr : exchange;
}

void connect(const py::object& exchange, const py::object& tensor, const py::tuple& dtypes,
             const py::tuple& watchers, const py::object& grad_enabled,
             const py::object& empty_like, const py::object& increment_version,
             const py::object& fresh_seed, const py::object& threads) {
  if (names == nullptr) names = new Names;
  torch.exchange = exchange_of(exchange);
  const auto keep = [](PyObject*& place, const py::object& value) {
    Py_XSETREF(place, value.inc_ref().ptr());
  };
  keep(torch.tensor, tensor);
  keep(torch.dtypes, dtypes);
  keep(torch.watchers, watchers);
  keep(torch.grad_enabled, grad_enabled);
  keep(torch.empty_like, empty_like);
  keep(torch.increment_version, increment_version);
  keep(torch.fresh_seed, fresh_seed);
  keep(torch.threads, threads);
}

}  // namespace

void add_calls(py::module_& m) {
  m.def("connect", &connect);
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace hos
