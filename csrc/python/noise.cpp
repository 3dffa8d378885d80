// Noise, called from Python.

#include "python/calls.h"
#include "python/kernels.h"

namespace hos {

// queue; out, dense; seed, offset, stream; start: global index of the first element; uniform, or
// normal.
PyObject* noise_call(Arguments& in) {
  const Queue queue = in.queue();
  const Seen out = in.tensor("out");
  const Counter seed = in.counter("seed");
  Counter offset;
  NoiseArgs a{};
  a.key.seed = seed.number;
  a.key.tag = in.tag(in.integer("stream"), &offset);
  a.key.start = in.bits("start");
  a.seed_pointer = seed.pointer;
  a.offset_pointer = offset.pointer;
  a.uniform = in.flag("uniform");
  a.count = out.count();
  a.out = out.data;
  in.done();
  {
    const py::gil_scoped_release unlocked;
    kernels(queue).noise(a, out.dtype, queue);
  }
  return none();
}

}  // namespace hos
