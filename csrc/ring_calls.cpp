#include "ring_calls.h"

#include <cerrno>
#include <climits>
#include <memory>
#include <new>
#include <vector>

#include "io_ring.h"

namespace kvtier {

namespace {

constexpr const char* kCapsuleName = "kvtier.io_ring";
constexpr size_t kSubmitWithGilBytes = size_t{1} << 20;  // looking up its pages takes about 30 us
constexpr Py_ssize_t kMaxBuffers = IOV_MAX;

void Destroy(PyObject* capsule) noexcept {
  delete static_cast<IoRing*>(PyCapsule_GetPointer(capsule, kCapsuleName));
}

bool Expect(const char* function, Py_ssize_t num_given, Py_ssize_t num_expected) noexcept {
  if (num_given == num_expected) return true;
  PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", function, num_expected,
               num_given);
  return false;
}

bool ReadInteger(PyObject* object, const char* name, long long least, long long most,
                 long long* value) noexcept {
  *value = PyLong_AsLongLong(object);
  if (*value == -1 && PyErr_Occurred()) return false;
  if (*value >= least && *value <= most) return true;
  PyErr_Format(PyExc_ValueError, "%s is %lld, not from %lld to %lld", name, *value, least, most);
  return false;
}

IoRing* OpenRing(PyObject* capsule) noexcept {
  IoRing* const ring = static_cast<IoRing*>(PyCapsule_GetPointer(capsule, kCapsuleName));
  if (ring != nullptr && !ring->is_open()) {
    PyErr_SetString(PyExc_ValueError, "the ring is closed");
    return nullptr;
  }
  return ring;
}

PyObject* NoneOr(int error) noexcept {
  if (error == 0) Py_RETURN_NONE;
  errno = error;
  return PyErr_SetFromErrno(PyExc_OSError);
}

}  // namespace

PyObject* RingOpenOf(PyObject* const* args, Py_ssize_t num_args) {
  long long num_entries;
  if (!Expect("ring_open", num_args, 1) ||
      !ReadInteger(args[0], "num_entries", 1, 32768, &num_entries)) {
    return nullptr;
  }
  std::unique_ptr<IoRing> ring(new IoRing);
  const int error = ring->Open(static_cast<unsigned>(num_entries));
  if (error != 0) return NoneOr(error);
  PyObject* const capsule = PyCapsule_New(ring.get(), kCapsuleName, &Destroy);
  if (capsule != nullptr) ring.release();
  return capsule;
}

PyObject* RingRegisterOf(PyObject* const* args, Py_ssize_t num_args) {
  long long slot, address, num_bytes;
  if (!Expect("ring_register", num_args, 4)) return nullptr;
  IoRing* const ring = OpenRing(args[0]);
  if (ring == nullptr || !ReadInteger(args[1], "slot", 0, kNumMemorySlots - 1, &slot) ||
      !ReadInteger(args[2], "address", 1, LLONG_MAX, &address) ||
      !ReadInteger(args[3], "num_bytes", 1, 1 << 30, &num_bytes)) {
    return nullptr;
  }
  int error = 0;
  WithoutGIL([&] {
    error = ring->Register(static_cast<unsigned>(slot), reinterpret_cast<void*>(address),
                           static_cast<size_t>(num_bytes));
  });
  return NoneOr(error);
}

PyObject* RingSubmitOf(PyObject* const* args, Py_ssize_t num_args) {
  long long token, fd, offset, slot;
  if (!Expect("ring_submit", num_args, 7)) return nullptr;
  IoRing* const ring = OpenRing(args[0]);
  if (ring == nullptr || !ReadInteger(args[1], "token", 1, LLONG_MAX, &token)) return nullptr;
  const int is_read = PyObject_IsTrue(args[2]);
  if (is_read < 0 || !ReadInteger(args[3], "fd", 0, INT_MAX, &fd) ||
      !ReadInteger(args[4], "offset", 0, LLONG_MAX, &offset) ||
      !ReadInteger(args[6], "slot", -1, kNumMemorySlots - 1, &slot)) {
    return nullptr;
  }
  const Py_ssize_t num_buffers = PySequence_Size(args[5]);
  if (num_buffers < 0) return nullptr;
  if (num_buffers < 1 || num_buffers > (slot < 0 ? kMaxBuffers : 1)) {
    return PyErr_Format(PyExc_ValueError, "%zd buffers, not from 1 to %zd", num_buffers,
                        slot < 0 ? kMaxBuffers : Py_ssize_t{1});
  }
  std::vector<iovec> vector;
  size_t total_bytes = 0;
  for (Py_ssize_t i = 0; i < num_buffers; ++i) {
    // The caller keeps the buffers until the transfer is over; the addresses alone are needed here.
    Ref item(PySequence_GetItem(args[5], i));
    BufferView view;
    if (!item || !view.Acquire(item.get(), is_read ? PyBUF_WRITABLE : PyBUF_SIMPLE)) return nullptr;
    vector.push_back({view->buf, static_cast<size_t>(view->len)});
    total_bytes += static_cast<size_t>(view->len);
  }
  if (total_bytes > INT_MAX) {
    return PyErr_Format(PyExc_ValueError, "%zu bytes are more than one transfer takes",
                        total_bytes);
  }
  int error = 0;
  if (slot >= 0) {
    error = ring->TransferFixed(static_cast<uint64_t>(token), is_read != 0, static_cast<int>(fd),
                                static_cast<uint64_t>(offset), vector[0].iov_base,
                                static_cast<uint32_t>(total_bytes), static_cast<unsigned>(slot));
    return NoneOr(error);
  }
  const auto transfer = [&] {
    error = ring->Transfer(static_cast<uint64_t>(token), is_read != 0, static_cast<int>(fd),
                           static_cast<uint64_t>(offset), vector.data(),
                           static_cast<unsigned>(vector.size()));
  };
  if (total_bytes <= kSubmitWithGilBytes) {
    transfer();
  } else {
    WithoutGIL(transfer);
  }
  return NoneOr(error);
}

PyObject* RingWakeOf(PyObject* const* args, Py_ssize_t num_args) {
  if (!Expect("ring_wake", num_args, 1)) return nullptr;
  IoRing* const ring = OpenRing(args[0]);
  return ring == nullptr ? nullptr : NoneOr(ring->Wake());
}

PyObject* RingWaitOf(PyObject* const* args, Py_ssize_t num_args) {
  long long timeout_us;
  if (!Expect("ring_wait", num_args, 2)) return nullptr;
  IoRing* const ring = OpenRing(args[0]);
  if (ring == nullptr || !ReadInteger(args[1], "timeout_us", -1, LLONG_MAX, &timeout_us)) {
    return nullptr;
  }
  std::vector<RingCompletion> completions;
  completions.reserve(64);
  int error = 0;
  WithoutGIL([&] { error = ring->Wait(timeout_us, &completions); });
  if (error != 0) return NoneOr(error);
  Ref result(PyList_New(static_cast<Py_ssize_t>(completions.size())));
  if (!result) return nullptr;
  for (size_t i = 0; i < completions.size(); ++i) {
    PyObject* const item =
        Py_BuildValue("(Ki)", static_cast<unsigned long long>(completions[i].token),
                      completions[i].result);
    if (item == nullptr || PyList_SetItem(result.get(), static_cast<Py_ssize_t>(i), item) != 0) {
      return nullptr;
    }
  }
  return result.release();
}

PyObject* RingCloseOf(PyObject* const* args, Py_ssize_t num_args) {
  if (!Expect("ring_close", num_args, 1)) return nullptr;
  IoRing* const ring = static_cast<IoRing*>(PyCapsule_GetPointer(args[0], kCapsuleName));
  if (ring == nullptr) return nullptr;
  ring->Close();
  Py_RETURN_NONE;
}

}  // namespace kvtier
