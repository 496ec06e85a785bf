#include "copy_calls.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "block_copy.h"

namespace kvtier {

namespace {

constexpr size_t kCopyWithGilBytes = size_t{1} << 18;  // about 30 us
constexpr Py_ssize_t kNumArguments = 6;                // and one that may be left out

using Int64s = std::vector<int64_t>;

bool ReadInt64s(PyObject* object, const char* name, Int64s* values) {
  BufferView view;
  if (!view.Acquire(object, PyBUF_ND | PyBUF_FORMAT)) return false;
  const char* format = view->format == nullptr ? "B" : view->format;
  if (*format == '@' || *format == '=' || *format == '<') ++format;
  if (view->ndim != 1 || view->itemsize != 8 ||
      (std::strcmp(format, "q") != 0 && std::strcmp(format, "l") != 0)) {
    PyErr_Format(PyExc_TypeError, "%s must be a one-dimensional contiguous array of int64", name);
    return false;
  }
  values->resize(static_cast<size_t>(view->len) / 8);
  if (view->len > 0) std::memcpy(values->data(), view->buf, static_cast<size_t>(view->len));
  return true;
}

struct PagedMemory {
  std::vector<Segment> segments;
  int64_t num_blocks = 0;
  int64_t block_bytes = 0;
};

bool ReadPagedMemory(PyObject* object, PagedMemory* paged) {
  Int64s words;
  if (!ReadInt64s(object, "paged", &words)) return false;
  bool is_valid = words.size() >= 4 && words.size() % 3 == 1 && words[0] > 0;
  for (size_t i = 1; is_valid && i < words.size(); i += 3) {
    const int64_t base = words[i], stride = words[i + 1], num_bytes = words[i + 2];
    const int64_t offset = paged->block_bytes;
    int64_t extent, end;
    is_valid = base > 0 && num_bytes > 0 && stride >= num_bytes &&
               !__builtin_mul_overflow(stride, words[0], &extent) &&
               !__builtin_add_overflow(base, extent, &end) &&
               !__builtin_add_overflow(offset, num_bytes, &paged->block_bytes);
    paged->segments.push_back({reinterpret_cast<uint8_t*>(base), static_cast<size_t>(stride),
                               static_cast<size_t>(num_bytes), static_cast<size_t>(offset)});
  }
  if (!is_valid) {
    PyErr_SetString(PyExc_ValueError,
                    "paged is [num_blocks, (base, stride, num_bytes) of each segment]");
    return false;
  }
  paged->num_blocks = words[0];
  return true;
}

bool CheckRange(const char* name, const Int64s& values, int64_t end) noexcept {
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i] >= 0 && values[i] < end) continue;
    PyErr_Format(PyExc_IndexError, "%s[%zu] is %lld, outside [0, %lld)", name, i,
                 static_cast<long long>(values[i]), static_cast<long long>(end));
    return false;
  }
  return true;
}

// Whether any two values are at least `distance` apart; equal ones may be allowed.
bool CheckDistances(const char* name, const Int64s& values, int64_t distance, bool may_be_equal) {
  std::vector<size_t> order(values.size());
  std::iota(order.begin(), order.end(), size_t{0});
  if (!std::is_sorted(values.begin(), values.end())) {
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t left, size_t right) { return values[left] < values[right]; });
  }
  for (size_t i = 1; i < order.size(); ++i) {
    const int64_t gap = values[order[i]] - values[order[i - 1]];
    if (gap >= distance || (gap == 0 && may_be_equal)) continue;
    PyErr_Format(PyExc_ValueError, "%s[%zu] is %lld and %s[%zu] is %lld: not %lld apart", name,
                 order[i - 1], static_cast<long long>(values[order[i - 1]]), name, order[i],
                 static_cast<long long>(values[order[i]]), static_cast<long long>(distance));
    return false;
  }
  return true;
}

bool ReadCopies(PyObject* const* args, const PagedMemory& paged, Direction direction,
                std::vector<BlockCopy>* copies) {
  Py_ssize_t arena_address, arena_bytes;
  Int64s block_ids, offsets;
  if (!ReadSize(args[1], "arena_address", 1, &arena_address) ||
      !ReadSize(args[2], "arena_bytes", 0, &arena_bytes) ||
      !ReadInt64s(args[3], "block_ids", &block_ids) ||
      !ReadInt64s(args[4], "arena_offsets", &offsets)) {
    return false;
  }
  if (block_ids.size() != offsets.size()) {
    PyErr_Format(PyExc_ValueError, "%zu block_ids and %zu arena_offsets", block_ids.size(),
                 offsets.size());
    return false;
  }
  const bool is_gather = direction == Direction::kToArena;
  const int64_t end = std::max<int64_t>(0, arena_bytes - paged.block_bytes + 1);
  if (!CheckRange("block_ids", block_ids, paged.num_blocks) ||
      !CheckRange("arena_offsets", offsets, end) ||
      !CheckDistances("block_ids", block_ids, 1, is_gather) ||
      !CheckDistances("arena_offsets", offsets, paged.block_bytes, !is_gather)) {
    return false;
  }
  copies->reserve(block_ids.size());
  for (size_t i = 0; i < block_ids.size(); ++i) {
    copies->push_back({static_cast<size_t>(block_ids[i]),
                       reinterpret_cast<uint8_t*>(arena_address + offsets[i])});
  }
  return true;
}

}  // namespace

PyObject* CopyBlocksOf(PyObject* const* args, Py_ssize_t num_args) {
  PagedMemory paged;
  Py_ssize_t num_threads = 1;
  if (!ExpectArguments("copy_blocks", num_args, std::max(num_args, kNumArguments)) ||
      !ExpectArguments("copy_blocks", num_args, std::min(num_args, kNumArguments + 1)) ||
      !ReadPagedMemory(args[0], &paged) ||
      (num_args > kNumArguments &&
       !ReadSize(args[kNumArguments], "num_threads", 1, &num_threads))) {
    return nullptr;
  }
  const int to_arena = PyObject_IsTrue(args[5]);
  if (to_arena < 0) return nullptr;
  const Direction direction = to_arena != 0 ? Direction::kToArena : Direction::kFromArena;
  std::vector<BlockCopy> copies;
  if (!ReadCopies(args, paged, direction, &copies)) return nullptr;
  const CopyBatch batch(paged.segments, std::move(copies), direction);
  if (batch.num_bytes() <= kCopyWithGilBytes) {
    batch.Run(1);
  } else {
    WithoutGIL([&] { batch.Run(static_cast<size_t>(num_threads)); });
  }
  return PyLong_FromSize_t(batch.num_bytes());
}

}  // namespace kvtier
