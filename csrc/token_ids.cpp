#include "token_ids.h"

#include <cstddef>
#include <cstring>
#include <type_traits>

namespace kvtier {

namespace {

constexpr Py_ssize_t kPrefetchDistance = 32;

// --- How CPython 3.11 to 3.14 lay out lists and ints ---
//
// The limited API reads an item by two calls, 5 ns; a long prompt has 131,072 items. Reading memory
// takes 1 ns. The layout is not promised, so it is used only where the version is one of those that
// were read, the sizes of the types are as they should be, and a trial gave the right answers. A
// build without the GIL never uses it.

struct ListLayout {
  PyVarObject base;
  PyObject** items;
};

struct IntLayout {
  PyObject base;
  uintptr_t tag;  // up to 3.11: signed number of digits; from 3.12 on: number of digits << 3 | (0
                  // positive, 1 zero, 2 negative)
  uint32_t digits[1];
};

// tag values of an int whose value is digits[0], or 0
struct IntTags {
  uintptr_t one_digit = 0;
  uintptr_t zero = 0;
};

bool reads_directly = false;
IntTags tags;

bool HasAttribute(PyObject* object, const char* name, long expected) noexcept {
  Ref attribute(PyObject_GetAttrString(object, name));
  if (!attribute) {
    PyErr_Clear();
    return false;
  }
  const long value = PyLong_AsLong(attribute.get());
  PyErr_Clear();
  return value == expected;
}

bool LayoutIsKnown() noexcept {
#if defined(Py_GIL_DISABLED) || !defined(Py_LIMITED_API)
  return false;
#else
  const unsigned minor = (Py_Version >> 16) & 0xff;
  if (Py_Version >> 24 != 3 || minor < 11 || minor > 14) return false;
  tags = minor == 11 ? IntTags{1, 0} : IntTags{1 << 3, 1};
  PyObject* int_info = PySys_GetObject("int_info");  // borrowed
  return int_info != nullptr && HasAttribute(int_info, "bits_per_digit", 30) &&
         HasAttribute(reinterpret_cast<PyObject*>(&PyList_Type), "__basicsize__",
                      sizeof(ListLayout) + sizeof(Py_ssize_t)) &&
         HasAttribute(reinterpret_cast<PyObject*>(&PyLong_Type), "__basicsize__",
                      offsetof(IntLayout, digits)) &&
         HasAttribute(reinterpret_cast<PyObject*>(&PyLong_Type), "__itemsize__", sizeof(uint32_t));
#endif
}

inline PyObject** ItemsOf(PyObject* list) noexcept {
  return reinterpret_cast<ListLayout*>(list)->items;
}

// Whether `item` is an int of at most one digit, not negative; then its value.
inline bool ReadSmallInt(PyObject* item, uint32_t* value) noexcept {
  if (!PyLong_CheckExact(item)) return false;
  const IntLayout* number = reinterpret_cast<IntLayout*>(item);
  if (number->tag == tags.one_digit) {
    *value = number->digits[0];
    return true;
  }
  *value = 0;
  return number->tag == tags.zero;
}

bool TrialSucceeds() noexcept {
  constexpr long long kTrials[] = {
      0, 1, 255, 256, 257, 50000, (1LL << 30) - 1, 1LL << 30, 1LL << 32, -1, -256, -(1LL << 31)};
  Ref list(PyList_New(0));
  if (!list) return false;
  for (const long long trial : kTrials) {
    Ref number(PyLong_FromLongLong(trial));
    if (!number || PyList_Append(list.get(), number.get()) != 0) return false;
  }
  Py_ssize_t position = 0;
  for (const long long trial : kTrials) {
    PyObject* item = PyList_GetItem(list.get(), position);
    if (ItemsOf(list.get())[position] != item) return false;
    uint32_t value = 0;
    const bool is_small = trial >= 0 && trial < 1LL << 30;
    if (ReadSmallInt(item, &value) != is_small || (is_small && value != trial)) return false;
    ++position;
  }
  return true;
}

// --- What holds for every interpreter ---

bool FailOutside(long long value, Py_ssize_t position) noexcept {
  PyErr_Format(PyExc_ValueError, "token id %lld at position %zd is outside [0, 2**32)", value,
               position);
  return false;
}

bool ReadOneId(PyObject* item, Py_ssize_t position, uint32_t* id) noexcept {
  Ref number(PyNumber_Index(item));  // of an int: the int itself
  if (!number) return false;
  const long long value = PyLong_AsLongLong(number.get());
  if (value == -1 && PyErr_Occurred()) {
    if (!PyErr_ExceptionMatches(PyExc_OverflowError)) return false;
    PyErr_Clear();
    PyErr_Format(PyExc_ValueError, "token id at position %zd is outside [0, 2**32)", position);
    return false;
  }
  if (value < 0 || value > UINT32_MAX) return FailOutside(value, position);
  *id = static_cast<uint32_t>(value);
  return true;
}

// One item through the interpreter. `__index__` of an odd item may run any code, so the item is
// held and the list asked again.
bool ReadListItem(PyObject* list, Py_ssize_t position, uint32_t* id) noexcept {
  PyObject* borrowed = PyList_GetItem(list, position);
  if (borrowed == nullptr) return false;
  Py_INCREF(borrowed);
  Ref item(borrowed);
  return ReadOneId(item.get(), position, id);
}

// Reads small ints in place from `position` on; stops before the first item of another kind.
Py_ssize_t ReadRun(PyObject* list, Py_ssize_t position, Py_ssize_t end, uint32_t* ids) noexcept {
  PyObject** items = ItemsOf(list);
  const Py_ssize_t prefetch_end = end - kPrefetchDistance;
  for (; position < end; ++position, ++ids) {
    if (position < prefetch_end) __builtin_prefetch(items[position + kPrefetchDistance]);
    if (!ReadSmallInt(items[position], ids)) break;
  }
  return position;
}

bool CheckRange(Py_ssize_t size, Py_ssize_t first, Py_ssize_t count) noexcept {
  if (first <= size && count <= size - first) return true;
  PyErr_Format(PyExc_ValueError, "tokens %zd to %zd of a sequence of %zd", first, first + count,
               size);
  return false;
}

bool ReadList(PyObject* list, Py_ssize_t first, Py_ssize_t count, bool directly,
              uint32_t* ids) noexcept {
  if (!CheckRange(PyList_Size(list), first, count)) return false;
  const Py_ssize_t end = first + count;
  for (Py_ssize_t position = first; position < end; ++position) {
    if (directly) {
      // Nothing runs between here and the end of the run, so the list cannot change; its size may
      // have since the last item.
      position = ReadRun(list, position, PyList_Size(list) < end ? position : end,
                         ids + (position - first));
      if (position == end) break;
    }
    if (!ReadListItem(list, position, ids + (position - first))) return false;
  }
  return true;
}

template <typename Integer>
bool ReadIntegers(const Py_buffer& view, Py_ssize_t first, Py_ssize_t count,
                  uint32_t* ids) noexcept {
  // A buffer may start anywhere, also where no integer does.
  const uint8_t* values = static_cast<const uint8_t*>(view.buf) + first * Py_ssize_t{sizeof(Integer)};
  using Word = std::make_unsigned_t<Integer>;
  Word bits = 0;  // of all values; a loop without a decision is done four values at a time
  for (Py_ssize_t i = 0; i < count; ++i) {
    Word value;
    std::memcpy(&value, values + i * Py_ssize_t{sizeof(Integer)}, sizeof(value));
    ids[i] = static_cast<uint32_t>(value);
    bits |= value;
  }
  constexpr int kNumBits = std::is_signed_v<Integer> && sizeof(Integer) == 4 ? 31 : 32;
  if (static_cast<uint64_t>(bits) >> kNumBits == 0) return true;
  PyErr_Format(PyExc_ValueError, "a token id is outside [0, 2**32)");
  return false;
}

}  // namespace

void InitTokenIds() noexcept {
  reads_directly = LayoutIsKnown() && TrialSucceeds();
  PyErr_Clear();
}

bool ReadsListsDirectly() noexcept { return reads_directly; }

bool TokenIds::Open(PyObject* token_ids, Py_ssize_t first, Py_ssize_t end) noexcept {
  if (PyList_Check(token_ids)) {
    Py_INCREF(token_ids);
    list_.reset(token_ids);
    return CheckRange(PyList_Size(token_ids), first, end - first);
  }
  if (PyObject_CheckBuffer(token_ids)) return OpenBuffer(token_ids, end);
  list_.reset(PySequence_GetSlice(token_ids, first, end));
  if (list_ && !PyList_Check(list_.get())) list_.reset(PySequence_List(list_.get()));
  if (!list_) return false;
  list_start_ = first;
  return CheckRange(first + PyList_Size(list_.get()), first, end - first);
}

bool TokenIds::OpenBuffer(PyObject* object, Py_ssize_t end) noexcept {
  if (!view_.Acquire(object, PyBUF_ND | PyBUF_FORMAT)) return false;
  const char* format = view_->format == nullptr ? "B" : view_->format;
  if (*format == '@' || *format == '=' || *format == '<') ++format;
  is_signed_ = std::strchr("ilq", *format) != nullptr;
  const bool is_integer =
      *format != '\0' && format[1] == '\0' && std::strchr("ilqILQ", *format) != nullptr;
  if (!is_integer || view_->ndim != 1 || (view_->itemsize != 4 && view_->itemsize != 8)) {
    PyErr_Format(PyExc_TypeError,
                 "token ids are 32- or 64-bit integers in one dimension, not '%s' in %d",
                 view_->format == nullptr ? "B" : view_->format, view_->ndim);
    return false;
  }
  return CheckRange(view_->len / view_->itemsize, 0, end);
}

bool TokenIds::Read(Py_ssize_t first, Py_ssize_t count, uint32_t* ids) noexcept {
  if (list_) return ReadList(list_.get(), first - list_start_, count, directly_, ids);
  if (view_->itemsize == 4) {
    return is_signed_ ? ReadIntegers<int32_t>(*view_, first, count, ids)
                      : ReadIntegers<uint32_t>(*view_, first, count, ids);
  }
  return is_signed_ ? ReadIntegers<int64_t>(*view_, first, count, ids)
                    : ReadIntegers<uint64_t>(*view_, first, count, ids);
}

}  // namespace kvtier
