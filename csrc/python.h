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

// Runs `work` with the GIL given up. For work of a millisecond and more: whoever gives the GIL up
// beside a busy Python thread waits for it, up to the interpreter's switch interval (5 ms).
template <typename Work>
void WithoutGIL(Work&& work) noexcept {
  PyThreadState* thread = PyEval_SaveThread();
  work();
  PyEval_RestoreThread(thread);
}

}  // namespace kvtier
