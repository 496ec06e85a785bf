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

// A ring, and who is in a call to it. All but `ring` is changed with the GIL held.
struct SharedRing {
  IoRing ring;
  int num_users = 0;
  bool is_closing = false;
};

SharedRing* PointerOf(PyObject* capsule) noexcept {
  return static_cast<SharedRing*>(PyCapsule_GetPointer(capsule, kCapsuleName));
}

void Destroy(PyObject* capsule) noexcept { delete PointerOf(capsule); }

bool ReadInteger(PyObject* object, const char* name, long long least, long long most,
                 long long* value) noexcept {
  *value = PyLong_AsLongLong(object);
  if (*value == -1 && PyErr_Occurred()) return false;
  if (*value >= least && *value <= most) return true;
  PyErr_Format(PyExc_ValueError, "%s is %lld, not from %lld to %lld", name, *value, least, most);
  return false;
}

SharedRing* OpenRing(PyObject* capsule) noexcept {
  SharedRing* const shared = PointerOf(capsule);
  if (shared != nullptr && (shared->is_closing || !shared->ring.is_open())) {
    PyErr_SetString(PyExc_ValueError, "the ring is closed");
    return nullptr;
  }
  return shared;
}

// Does work on a ring without the GIL. Where another thread closes the ring meanwhile, it goes when
// the last such work is done.
template <typename Work>
void UseWithoutGIL(SharedRing* shared, Work&& work) {
  ++shared->num_users;
  WithoutGIL(work);
  if (--shared->num_users == 0 && shared->is_closing) shared->ring.Close();
}

PyObject* NoneOr(int error) noexcept {
  if (error == 0) Py_RETURN_NONE;
  errno = error;
  return PyErr_SetFromErrno(PyExc_OSError);
}

}  // namespace

PyObject* RingOpenOf(PyObject* const* args, Py_ssize_t num_args) {
  long long num_entries;
  if (!ExpectArguments("ring_open", num_args, 1) ||
      !ReadInteger(args[0], "num_entries", 1, 32768, &num_entries)) {
    return nullptr;
  }
  std::unique_ptr<SharedRing> shared(new SharedRing);
  const int error = shared->ring.Open(static_cast<unsigned>(num_entries));
  if (error != 0) return NoneOr(error);
  PyObject* const capsule = PyCapsule_New(shared.get(), kCapsuleName, &Destroy);
  if (capsule != nullptr) shared.release();
  return capsule;
}

PyObject* RingRegisterOf(PyObject* const* args, Py_ssize_t num_args) {
  long long slot, address, num_bytes;
  if (!ExpectArguments("ring_register", num_args, 4)) return nullptr;
  SharedRing* const shared = OpenRing(args[0]);
  if (shared == nullptr || !ReadInteger(args[1], "slot", 0, kNumMemorySlots - 1, &slot) ||
      !ReadInteger(args[2], "address", 1, LLONG_MAX, &address) ||
      !ReadInteger(args[3], "num_bytes", 1, 1 << 30, &num_bytes)) {
    return nullptr;
  }
  int error = 0;
  UseWithoutGIL(shared, [&] {
    error = shared->ring.Register(static_cast<unsigned>(slot), reinterpret_cast<void*>(address),
                                  static_cast<size_t>(num_bytes));
  });
  return NoneOr(error);
}

PyObject* RingSubmitOf(PyObject* const* args, Py_ssize_t num_args) {
  long long token, fd, offset, slot;
  if (!ExpectArguments("ring_submit", num_args, 7)) return nullptr;
  if (!ReadInteger(args[1], "token", 1, LLONG_MAX, &token)) return nullptr;
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
  SharedRing* const shared = OpenRing(args[0]);  // last: what was asked above may have closed it
  if (shared == nullptr) return nullptr;
  int error = 0;
  if (slot >= 0) {
    error = shared->ring.TransferFixed(
        static_cast<uint64_t>(token), is_read != 0, static_cast<int>(fd),
        static_cast<uint64_t>(offset), vector[0].iov_base, static_cast<uint32_t>(total_bytes),
        static_cast<unsigned>(slot));
    return NoneOr(error);
  }
  const auto transfer = [&] {
    error = shared->ring.Transfer(static_cast<uint64_t>(token), is_read != 0,
                                  static_cast<int>(fd), static_cast<uint64_t>(offset),
                                  vector.data(), static_cast<unsigned>(vector.size()));
  };
  if (total_bytes <= kSubmitWithGilBytes) {
    transfer();
  } else {
    UseWithoutGIL(shared, transfer);
  }
  return NoneOr(error);
}

PyObject* RingWakeOf(PyObject* const* args, Py_ssize_t num_args) {
  if (!ExpectArguments("ring_wake", num_args, 1)) return nullptr;
  SharedRing* const shared = OpenRing(args[0]);
  return shared == nullptr ? nullptr : NoneOr(shared->ring.Wake());
}

PyObject* RingWaitOf(PyObject* const* args, Py_ssize_t num_args) {
  long long timeout_us;
  if (!ExpectArguments("ring_wait", num_args, 2)) return nullptr;
  SharedRing* const shared = OpenRing(args[0]);
  if (shared == nullptr || !ReadInteger(args[1], "timeout_us", -1, LLONG_MAX, &timeout_us)) {
    return nullptr;
  }
  std::vector<RingCompletion> completions;
  completions.reserve(64);
  int error = 0;
  UseWithoutGIL(shared, [&] { error = shared->ring.Wait(timeout_us, &completions); });
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
  if (!ExpectArguments("ring_close", num_args, 1)) return nullptr;
  SharedRing* const shared = PointerOf(args[0]);
  if (shared == nullptr) return nullptr;
  if (shared->num_users == 0 || !shared->ring.is_open()) {
    shared->ring.Close();
  } else if (!shared->is_closing) {
    shared->is_closing = true;
    shared->ring.Wake();  // who waits returns
  }
  Py_RETURN_NONE;
}

}  // namespace kvtier
