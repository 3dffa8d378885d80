// The arguments of a call from Python, by name. A call reads each of its arguments once, in the one
// place where it fills the kernel's argument struct; Python may write them in any order.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "base/queue.h"
#include "python/tensor.h"

namespace hos {

// A seed or an offset: a number, or a tensor of one on a GPU, which the kernel reads.
struct Counter {
  uint64_t number;
  const uint64_t* pointer;
};

// sigma or step_size: a number for all rows, or one for each, in double precision.
class Level {
 public:
  void take(PyObject* value, int64_t rows);
  void take(const Seen& seen, int64_t rows);
  double number() const { return number_; }
  const double* each() const { return each_; }

 private:
  double number_ = 0.0;
  const double* each_ = nullptr;
  std::vector<double> held_;
};

class Arguments {
 public:
  Arguments(PyObject* const* values, Py_ssize_t positional, PyObject* names);

  // As a rule Python writes the names in the order of the questions: then no search is needed.
  template <size_t N>
  PyObject* object(const char (&name)[N]) {
    ++asked_;
    if (next_ < count_ && is_named(next_, name, N - 1)) return values_[next_++];
    return find(name, N - 1);
  }
  template <size_t N>
  bool flag(const char (&name)[N]) {
    return object(name) == Py_True;
  }
  template <size_t N>
  int64_t size(const char (&name)[N]) {
    return to_size(object(name));
  }
  template <size_t N>
  int integer(const char (&name)[N]) {
    return int(size(name));
  }
  template <size_t N>
  uint64_t bits(const char (&name)[N]) {  // of an int of any sign, modulo 2^64
    return to_bits(object(name));
  }
  template <size_t N>
  Seen tensor(const char (&name)[N]) {  // no data for None
    PyObject* t = object(name);
    return t == Py_None ? Seen{} : read(t);
  }
  template <size_t N>
  Counter counter(const char (&name)[N]) {  // an int, or a 0-d int64 tensor
    return to_counter(object(name));
  }
  Queue queue();                           // "queue": (device, threads or stream)
  uint64_t tag(int stream, Counter* out);  // "offset", and beside it the stream
  void done() const;                       // refuses more than was asked for

 private:
  bool is_named(Py_ssize_t at, const char* name, size_t length) const {
    PyObject* given = PyTuple_GET_ITEM(names_, at);
    return PyUnicode_IS_COMPACT_ASCII(given) && size_t(PyUnicode_GET_LENGTH(given)) == length &&
           memcmp(PyUnicode_1BYTE_DATA(given), name, length) == 0;
  }
  PyObject* find(const char* name, size_t length);
  static int64_t to_size(PyObject* value);
  static uint64_t to_bits(PyObject* value);
  static Counter to_counter(PyObject* value);

  PyObject* const* values_;
  PyObject* names_;
  Py_ssize_t count_, next_ = 0, asked_ = 0;
};

}  // namespace hos
