#include "receive_calls.h"

#include <algorithm>
#include <cerrno>
#include <climits>
#include <memory>
#include <vector>

#include "receive.h"

namespace kvtier {

namespace {

constexpr Py_ssize_t kMaxBuffers = 16;
constexpr int64_t kLongestUs = int64_t{86400} * 1000000;

// Writable memory of Python objects, held until this goes.
class Buffers {
 public:
  bool Acquire(PyObject* sequence) {
    const Py_ssize_t count = PySequence_Size(sequence);
    if (count < 0) return false;
    if (count > kMaxBuffers) {
      PyErr_Format(PyExc_ValueError, "%zd buffers, not up to %zd", count, kMaxBuffers);
      return false;
    }
    for (Py_ssize_t i = 0; i < count; ++i) {
      Ref item(PySequence_GetItem(sequence, i));
      if (!item || !views_[i].Acquire(item.get(), PyBUF_WRITABLE)) return false;
      vector_.push_back({views_[i]->buf, static_cast<size_t>(views_[i]->len)});
    }
    return true;
  }
  const std::vector<iovec>& vector() const noexcept { return vector_; }

 private:
  BufferView views_[kMaxBuffers];
  std::vector<iovec> vector_;
};

int64_t NoLongerThanADay(Py_ssize_t time_us) noexcept {
  return std::min<int64_t>(time_us, kLongestUs);
}

PyObject* ReceiveWith(TakeStripes take, PyObject* const* args, Py_ssize_t num_args) {
  Py_ssize_t fd, hashed, stall_us, total_us;
  if (!ExpectArguments("receive", num_args, 5) || !ReadSize(args[0], "fd", -1, &fd) ||
      !ReadSize(args[2], "hashed", 0, &hashed) || !ReadSize(args[3], "stall_us", 1, &stall_us) ||
      !ReadSize(args[4], "total_us", 0, &total_us)) {
    return nullptr;
  }
  // On the heap and let go by hand: see WithoutGIL. A thread that is ended in there leaks them.
  std::unique_ptr<Buffers> owner(new Buffers);
  if (!owner->Acquire(args[1])) return nullptr;
  const std::vector<iovec>& vector = owner->vector();
  const size_t index = static_cast<size_t>(hashed);
  if (fd > INT_MAX || index >= vector.size() || vector[index].iov_len < kChecksumLeast) {
    return PyErr_Format(PyExc_ValueError, "buffer %zd of %zu is not there, or not of %zu bytes",
                        hashed, vector.size(), kChecksumLeast);
  }
  uint8_t digest[kChecksumBytes];
  int status = kReceived;
  const Limits limits = {NoLongerThanADay(stall_us), NoLongerThanADay(total_us)};
  Buffers* const held = owner.release();
  WithoutGIL([&] {
    status = Receive(static_cast<int>(fd), held->vector(), index, limits, take, digest);
  });
  owner.reset(held);
  if (status == kClosed) Py_RETURN_NONE;
  if (status != kReceived) {
    errno = status;
    return PyErr_SetFromErrno(PyExc_OSError);
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(digest), kChecksumBytes);
}

}  // namespace

PyObject* ReceiveOf(PyObject* const* args, Py_ssize_t num_args) {
  return ReceiveWith(BestTakeStripes(), args, num_args);
}

PyObject* PortableReceiveOf(PyObject* const* args, Py_ssize_t num_args) {
  return ReceiveWith(PortableTakeStripes(), args, num_args);
}

}  // namespace kvtier
