// Direct calls: on plain tensors that agree, a kernel runs at once, in the one native call, and
// neither Python's checks nor autograd are entered. C++ only answers whether all is plain: what it
// refuses goes the checked way, where Python explains what is wrong, if anything is.
#pragma once

#include "python/arguments.h"

namespace hos {

// kDirect: the kernel may run. kTracked: all is plain, but autograd wants to record the call.
enum Verdict { kRefused, kDirect, kTracked };

// None, or a torch.Tensor and no subclass, whose code might want to see the call.
bool is_plain(PyObject* t);

bool requires_grad(PyObject* t);

// Whether a transform, tracing or a dispatch mode is at work (kRefused), or a gradient is wanted of
// one of the tensors.
Verdict observed(PyObject* const* tensors, int count);

// A tensor on the CPU without a lazy minus sign, of a dtype of the kernels.
bool read_memory(PyObject* t, Seen* out);

// An int below 2^bits, and no bool.
bool read_counter(PyObject* value, int bits, uint64_t* out);

// A positive number, or a plain tensor without gradient that holds such.
bool read_level(PyObject* value, int64_t rows, Level* out);

// Runs body(queue) for work on so many elements: brief work on this thread, without letting go of
// the interpreter.
template <class Body>
void run_direct(int64_t elements, const Body& body) {
  constexpr int64_t kBrief = 16 * 1024;
  if (elements < kBrief) return body(Queue{-1, 1});
  const auto threads = py::cast<uint64_t>(taken(PyObject_CallNoArgs(torch.threads)));
  const py::gil_scoped_release unlocked;
  body(Queue{-1, threads});
}

// judge(), or kRefused where it throws: torch has no address for it, or an int is out of range.
template <class Judge>
Verdict verdict_of(const Judge& judge) {
  try {
    return judge();
  } catch (const std::exception&) {
    return kRefused;
  }
}

}  // namespace hos
