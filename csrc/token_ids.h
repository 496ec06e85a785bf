// Token ids from Python objects.
#pragma once

#include <cstdint>

#include "python.h"

namespace kvtier {

// Once at import: finds out whether the fast way of reading lists can be used with this
// interpreter.
void InitTokenIds() noexcept;
// Whether it can. Else every item costs two calls into the interpreter.
bool ReadsListsDirectly() noexcept;

// Token ids out of a list, another sequence, or a one-dimensional contiguous buffer of 32- or
// 64-bit integers.
//
// Both methods return false with a Python exception set: ValueError for an id outside [0, 2^32) or
// too few of them, TypeError for what is no integer.
class TokenIds {
 public:
  // `directly`: read lists the fast way where that is possible.
  explicit TokenIds(bool directly) noexcept : directly_(directly && ReadsListsDirectly()) {}

  // Gets ready to read positions [first, end).
  bool Open(PyObject* token_ids, Py_ssize_t first, Py_ssize_t end) noexcept;
  // Reads positions [first, first + count) of those.
  bool Read(Py_ssize_t first, Py_ssize_t count, uint32_t* ids) noexcept;

 private:
  bool OpenBuffer(PyObject* object, Py_ssize_t end) noexcept;

  bool directly_;
  Ref list_;                   // either the list,
  Py_ssize_t list_start_ = 0;  // whose first item stands at this position,
  BufferView view_;            // or the buffer
  bool is_signed_ = false;
};

}  // namespace kvtier
