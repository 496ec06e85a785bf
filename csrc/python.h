// The little that kvtier needs to speak with CPython safely: owned references and buffers.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace kvtier {

// An owned reference; may be null.
class Ref {
 public:
  explicit Ref(PyObject* object = nullptr) noexcept : object_(object) {}
  ~Ref() { Py_XDECREF(object_); }
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;

  PyObject* get() const noexcept { return object_; }
  PyObject* release() noexcept {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }
  void reset(PyObject* object) noexcept {
    PyObject* old = object_;
    object_ = object;
    Py_XDECREF(old);
  }
  explicit operator bool() const noexcept { return object_ != nullptr; }

 private:
  PyObject* object_;
};

// A contiguous buffer of an object, held for the lifetime of this one.
class BufferView {
 public:
  BufferView() = default;
  ~BufferView() {
    if (held_) PyBuffer_Release(&view_);
  }
  BufferView(const BufferView&) = delete;
  BufferView& operator=(const BufferView&) = delete;

  // False with a Python exception set where the object has no C-contiguous buffer.
  bool Acquire(PyObject* object, int flags = PyBUF_SIMPLE) noexcept {
    held_ = PyObject_GetBuffer(object, &view_, flags) == 0;
    return held_;
  }
  const Py_buffer& operator*() const noexcept { return view_; }
  const Py_buffer* operator->() const noexcept { return &view_; }

 private:
  Py_buffer view_ = {};
  bool held_ = false;
};

// Whether a function got as many arguments as it takes; else false with TypeError set.
inline bool ExpectArguments(const char* function, Py_ssize_t num_given, Py_ssize_t num_expected) noexcept {
  if (num_given == num_expected) return true;
  PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", function, num_expected,
               num_given);
  return false;
}

// An integer of `at_least` or more; else false with ValueError or OverflowError set.
inline bool ReadSize(PyObject* object, const char* name, Py_ssize_t at_least, Py_ssize_t* size) noexcept {
  *size = PyNumber_AsSsize_t(object, PyExc_OverflowError);
  if (*size == -1 && PyErr_Occurred()) return false;
  if (*size >= at_least) return true;
  PyErr_Format(PyExc_ValueError, "%s is %zd, not %zd or more", name, *size, at_least);
  return false;
}

// Runs `work` with the GIL given up. For work of a millisecond and more: whoever gives the GIL up
// beside a busy Python thread waits for it, up to the interpreter's switch interval (5 ms).
//
// Where the interpreter ends meanwhile, CPython up to 3.13 ends a daemon thread that wants the GIL
// back by unwinding its stack. So this is not noexcept, nor is any function that leads here: that
// would end the process by abort. And no caller may own Python objects at this point.
template <typename Work>
void WithoutGIL(Work&& work) {
  PyThreadState* thread = PyEval_SaveThread();
  work();
  PyEval_RestoreThread(thread);
}

}  // namespace kvtier
