// How a Python tensor is read, and what is asked of torch.

#include "python/tensor.h"

#include <cstddef>
#include <stdexcept>

namespace hos {

namespace {
Torch held_torch;  // set by connect
Names held_names;
}  // namespace

const Torch& torch = held_torch;
const Names& names = held_names;

// The binary interface of DLPack 1: what is needed of it, in its order.
struct DlTensor {
  void* data;
  int32_t device_type, device;
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};
static_assert(sizeof(DlTensor) == 48 && offsetof(DlTensor, byte_offset) == 40, "DLPack's layout");

struct DlExchange {
  uint32_t major, minor;
  const DlExchange* previous;
  void (*others[3])();
  int (*read)(void* object, DlTensor* out);
};

namespace {

constexpr int kDlCpu = 1, kDlFloat = 2, kDlBFloat = 4;

void check_dims(int64_t dims) {
  if (dims > kMaxDims) throw std::runtime_error("hos_ext: a tensor of more than 8 axes");
}

Seen read_exchange(PyObject* t) {
  DlTensor d{};
  if (torch.exchange->read(t, &d) != 0) throw py::error_already_set();
  check_dims(d.dims);
  const int kind = d.lanes == 1 ? d.code * 256 + d.bits : 0;
  Seen seen{};
  seen.data = static_cast<char*>(d.data) + d.byte_offset;
  seen.cpu = d.device_type == kDlCpu;
  seen.dtype = kind == kDlFloat * 256 + 32    ? kFloat32
               : kind == kDlFloat * 256 + 64  ? kFloat64
               : kind == kDlFloat * 256 + 16  ? kFloat16
               : kind == kDlBFloat * 256 + 16 ? kBFloat16
                                              : -1;
  seen.dims = d.dims;
  for (int i = 0; i < d.dims; ++i) {
    seen.shape[i] = d.shape[i];
    seen.strides[i] = d.strides[i];
  }
  return seen;
}

int read_sizes(PyObject* owned, int64_t* out) {
  const py::tuple sizes = taken(owned);
  check_dims(int64_t(sizes.size()));
  for (const py::handle size : sizes) *out++ = size.cast<int64_t>();
  return int(sizes.size());
}

Seen read_attributes(PyObject* t) {
  Seen seen{};
  seen.cpu = is_true(PyObject_GetAttr(t, names.is_cpu));
  const py::object dtype = taken(PyObject_GetAttr(t, names.dtype));
  seen.dtype = -1;
  for (int i = 0; i < int(PyTuple_GET_SIZE(torch.dtypes)); ++i) {
    if (dtype.ptr() == PyTuple_GET_ITEM(torch.dtypes, i)) seen.dtype = i;
  }
  seen.dims = read_sizes(PyObject_GetAttr(t, names.shape), seen.shape);
  read_sizes(PyObject_CallMethodNoArgs(t, names.stride), seen.strides);
  const py::object address = taken(PyObject_CallMethodNoArgs(t, names.data_ptr));
  seen.data = static_cast<char*>(PyLong_AsVoidPtr(address.ptr()));
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  return seen;
}

// The exchange interface in a capsule, or an earlier one that it leads to; null for None.
const DlExchange* exchange_of(const py::object& capsule) {
  if (capsule.is_none()) return nullptr;
  const void* found = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (found == nullptr) throw py::error_already_set();
  const DlExchange* exchange = static_cast<const DlExchange*>(found);
  while (exchange != nullptr && exchange->major != 1) exchange = exchange->previous;
  return exchange == nullptr || exchange->read == nullptr ? nullptr : exchange;
}

}  // namespace

// Takes over a new reference, or the Python error that came instead.
py::object taken(PyObject* owned) {
  if (owned == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(owned);
}

bool is_true(PyObject* owned) {
  const py::object answer = taken(owned);
  const int truth = PyObject_IsTrue(answer.ptr());
  if (truth < 0) throw py::error_already_set();
  return truth == 1;
}

Seen read(PyObject* t) {
  const Seen seen = torch.exchange != nullptr ? read_exchange(t) : read_attributes(t);
  if (seen.data == nullptr && seen.count() > 0) {
    throw std::runtime_error("hos_ext: tensors must have memory, got one without");
  }
  return seen;
}

View rows_of(const Seen& t, bool stacked) {
  if (t.dims == 0) return {};
  return {t.data, stacked ? t.strides[0] : 0, t.strides[stacked ? 1 : 0], 1, 1};
}

View columns_of(const Seen& t, bool stacked) {
  View view = rows_of(t, stacked);
  if (t.dims == 0) return view;
  view.row = t.strides[t.dims - 2];
  view.column = t.strides[t.dims - 1];
  return view;
}

void connect(const py::object& exchange, const py::object& tensor, const py::tuple& dtypes,
             const py::tuple& watchers, const py::object& grad_enabled,
             const py::object& empty_like, const py::object& increment_version,
             const py::object& fresh_seed, const py::object& threads) {
  if (names.is_neg == nullptr) {
    const auto intern = [](const char* name) { return PyUnicode_InternFromString(name); };
    held_names = {intern("is_neg"),   intern("requires_grad"), intern("is_cpu"),
                  intern("dtype"),    intern("shape"),         intern("stride"),
                  intern("data_ptr"), intern("new_empty")};
  }
  held_torch.exchange = exchange_of(exchange);
  const auto keep = [](PyObject*& place, const py::object& value) {
    Py_XSETREF(place, value.inc_ref().ptr());
  };
  keep(held_torch.tensor, tensor);
  keep(held_torch.dtypes, dtypes);
  keep(held_torch.watchers, watchers);
  keep(held_torch.grad_enabled, grad_enabled);
  keep(held_torch.empty_like, empty_like);
  keep(held_torch.increment_version, increment_version);
  keep(held_torch.fresh_seed, fresh_seed);
  keep(held_torch.threads, threads);
}

}  // namespace hos
