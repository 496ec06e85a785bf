// kvtier._core: what Python sees. kvtier/_core.pyi has the signatures, kvtier/_fallback.py says
// what each function does.

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#include "block_copy.h"
#include "key_chain.h"
#include "prefault.h"
#include "python.h"
#include "ring_calls.h"
#include "token_ids.h"

namespace kvtier {
namespace {

constexpr long kAbiVersion =
    2;  // kvtier/_native.py asks for this one; change both with any signature or meaning

constexpr Py_ssize_t kTokensAtATime = 8192;  // read, then hashed while they are in the L1 cache
constexpr size_t kCopyWithGilBytes = size_t{1} << 18;  // about 30 us

bool ExpectArguments(const char* function, Py_ssize_t num_given, Py_ssize_t num_expected) noexcept {
  if (num_given == num_expected) return true;
  PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", function, num_expected,
               num_given);
  return false;
}

bool ReadSize(PyObject* object, const char* name, Py_ssize_t at_least, Py_ssize_t* size) noexcept {
  *size = PyNumber_AsSsize_t(object, PyExc_OverflowError);
  if (*size == -1 && PyErr_Occurred()) return false;
  if (*size >= at_least) return true;
  PyErr_Format(PyExc_ValueError, "%s is %zd, not %zd or more", name, *size, at_least);
  return false;
}

// --- chain_keys ---

struct Extras {
  std::vector<uint8_t> data;
  std::vector<size_t> offsets;
};

bool ReadExtras(PyObject* object, Py_ssize_t num_blocks, Extras* extras) {
  if (object == Py_None) return true;
  const Py_ssize_t size = PySequence_Size(object);
  if (size < 0) return false;
  if (size != num_blocks) {
    PyErr_Format(PyExc_ValueError, "extra bytes for %zd blocks of %zd", size, num_blocks);
    return false;
  }
  extras->offsets.push_back(0);
  for (Py_ssize_t block = 0; block < num_blocks; ++block) {
    Ref item(PySequence_GetItem(object, block));
    BufferView view;
    if (!item || !view.Acquire(item.get())) return false;
    const uint8_t* bytes = static_cast<const uint8_t*>(view->buf);
    extras->data.insert(extras->data.end(), bytes, bytes + view->len);
    extras->offsets.push_back(extras->data.size());
  }
  return true;
}

// Puts the keys into `list` from position `first` on.
bool SetKeys(PyObject* list, Py_ssize_t first, const uint8_t* keys, Py_ssize_t num_keys) noexcept {
  for (Py_ssize_t i = 0; i < num_keys; ++i, keys += kKeyBytes) {
    PyObject* key = PyBytes_FromStringAndSize(reinterpret_cast<const char*>(keys), kKeyBytes);
    if (key == nullptr || PyList_SetItem(list, first + i, key) != 0)
      return false;  // it takes over the reference
  }
  return true;
}

PyObject* ChainInPieces(const Sha256& sha, const uint8_t* parent, TokenIds* token_ids,
                        Py_ssize_t first_token, Py_ssize_t num_blocks, Py_ssize_t block_tokens,
                        const Extras& extras) {
  const Py_ssize_t piece_blocks =
      std::min(num_blocks, std::max<Py_ssize_t>(2, kTokensAtATime / block_tokens / 2 * 2));
  std::vector<uint32_t> ids(static_cast<size_t>(piece_blocks * block_tokens));
  std::vector<uint8_t> keys(static_cast<size_t>(piece_blocks) * kKeyBytes);
  Ref result(PyList_New(num_blocks));
  if (!result) return nullptr;
  for (Py_ssize_t block = 0; block < num_blocks; block += piece_blocks) {
    const Py_ssize_t num_here = std::min(piece_blocks, num_blocks - block);
    if (!token_ids->Read(first_token + block * block_tokens, num_here * block_tokens, ids.data()))
      return nullptr;
    const ExtraBytes extra_bytes = {
        extras.data.data(), extras.offsets.empty() ? nullptr : extras.offsets.data() + block};
    uint8_t previous[kKeyBytes];
    std::memcpy(previous, parent, kKeyBytes);
    ChainKeys(sha, previous, ids.data(), num_here, block_tokens, extra_bytes, keys.data());
    if (!SetKeys(result.get(), block, keys.data(), num_here)) return nullptr;
    parent = keys.data() + (num_here - 1) * kKeyBytes;
  }
  return result.release();
}

// `is_portable`: as it goes on every CPU and interpreter.
template <bool is_portable>
PyObject* ChainKeysOf(PyObject* const* args, Py_ssize_t num_args) {
  Py_ssize_t first_token, num_blocks, block_tokens;
  if (!ExpectArguments("chain_keys", num_args, 6) ||
      !ReadSize(args[2], "first_token", 0, &first_token) ||
      !ReadSize(args[3], "num_blocks", 0, &num_blocks) ||
      !ReadSize(args[4], "block_tokens", 1, &block_tokens)) {
    return nullptr;
  }
  BufferView parent;
  if (!parent.Acquire(args[0])) return nullptr;
  if (parent->len != static_cast<Py_ssize_t>(kKeyBytes)) {
    return PyErr_Format(PyExc_ValueError, "the parent key has %zd bytes, not 16", parent->len);
  }
  Py_ssize_t num_tokens, end;
  if (__builtin_mul_overflow(num_blocks, block_tokens, &num_tokens) ||
      __builtin_add_overflow(first_token, num_tokens, &end)) {
    return PyErr_Format(PyExc_ValueError, "%zd blocks of %zd tokens are too many", num_blocks,
                        block_tokens);
  }
  Extras extras;
  TokenIds token_ids(!is_portable);
  if (!ReadExtras(args[5], num_blocks, &extras) || !token_ids.Open(args[1], first_token, end))
    return nullptr;
  return ChainInPieces(is_portable ? PortableSha256() : BestSha256(),
                       static_cast<const uint8_t*>(parent->buf), &token_ids, first_token,
                       num_blocks, block_tokens, extras);
}

// --- copy_blocks ---

bool ReadInt64s(PyObject* object, const char* name, std::vector<int64_t>* values) {
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
  std::vector<int64_t> words;
  if (!ReadInt64s(object, "paged", &words)) return false;
  bool is_valid = words.size() >= 4 && words.size() % 3 == 1 && words[0] > 0;
  for (size_t i = 1; is_valid && i < words.size(); i += 3) {
    const int64_t base = words[i], stride = words[i + 1], num_bytes = words[i + 2];
    int64_t extent, end;
    is_valid = base > 0 && num_bytes > 0 && stride >= num_bytes &&
               !__builtin_mul_overflow(stride, words[0], &extent) &&
               !__builtin_add_overflow(base, extent, &end) &&
               !__builtin_add_overflow(paged->block_bytes, num_bytes, &paged->block_bytes);
    paged->segments.push_back({reinterpret_cast<uint8_t*>(base), static_cast<size_t>(stride),
                               static_cast<size_t>(num_bytes)});
  }
  if (!is_valid) {
    PyErr_SetString(PyExc_ValueError,
                    "paged is [num_blocks, (base, stride, num_bytes) of each segment]");
    return false;
  }
  paged->num_blocks = words[0];
  return true;
}

bool ReadCopies(PyObject* const* args, const PagedMemory& paged, std::vector<BlockCopy>* copies) {
  Py_ssize_t arena_address, arena_bytes;
  std::vector<int64_t> block_ids, offsets;
  if (!ReadSize(args[1], "arena_address", 1, &arena_address) ||
      !ReadSize(args[2], "arena_bytes", 0, &arena_bytes) ||
      !ReadInt64s(args[3], "block_ids", &block_ids) ||
      !ReadInt64s(args[4], "arena_offsets", &offsets)) {
    return false;
  }
  if (block_ids.size() != offsets.size()) {
    PyErr_Format(PyExc_ValueError, "%zu block ids and %zu arena offsets", block_ids.size(),
                 offsets.size());
    return false;
  }
  copies->reserve(block_ids.size());
  for (size_t i = 0; i < block_ids.size(); ++i) {
    if (block_ids[i] < 0 || block_ids[i] >= paged.num_blocks) {
      PyErr_Format(PyExc_IndexError, "block id %lld is outside [0, %lld)",
                   static_cast<long long>(block_ids[i]), static_cast<long long>(paged.num_blocks));
      return false;
    }
    if (offsets[i] < 0 || paged.block_bytes > arena_bytes ||
        offsets[i] > arena_bytes - paged.block_bytes) {
      PyErr_Format(PyExc_IndexError,
                   "a block of %lld bytes at arena offset %lld is outside the arena of %zd bytes",
                   static_cast<long long>(paged.block_bytes), static_cast<long long>(offsets[i]),
                   arena_bytes);
      return false;
    }
    copies->push_back({static_cast<size_t>(block_ids[i]),
                       reinterpret_cast<uint8_t*>(arena_address + offsets[i])});
  }
  return true;
}

PyObject* CopyBlocksOf(PyObject* const* args, Py_ssize_t num_args) {
  PagedMemory paged;
  std::vector<BlockCopy> copies;
  if (!ExpectArguments("copy_blocks", num_args, 6) || !ReadPagedMemory(args[0], &paged) ||
      !ReadCopies(args, paged, &copies)) {
    return nullptr;
  }
  const int to_arena = PyObject_IsTrue(args[5]);
  if (to_arena < 0) return nullptr;
  const size_t total_bytes = static_cast<size_t>(paged.block_bytes) * copies.size();
  if (total_bytes <= kCopyWithGilBytes) {
    CopyBlocks(paged.segments, copies, total_bytes, to_arena != 0);
  } else {
    WithoutGIL([&] { CopyBlocks(paged.segments, copies, total_bytes, to_arena != 0); });
  }
  return PyLong_FromSize_t(total_bytes);
}

// --- prefault ---

PyObject* PrefaultOf(PyObject* const* args, Py_ssize_t num_args) {
  Py_ssize_t address, num_bytes;
  if (!ExpectArguments("prefault", num_args, 2) || !ReadSize(args[0], "address", 1, &address) ||
      !ReadSize(args[1], "num_bytes", 0, &num_bytes)) {
    return nullptr;
  }
  int error = 0;
  WithoutGIL(
      [&] { error = Prefault(static_cast<uintptr_t>(address), static_cast<size_t>(num_bytes)); });
  if (error == 0) Py_RETURN_NONE;
  errno = error;
  return PyErr_SetFromErrno(PyExc_OSError);
}

// --- the module ---

// No C++ exception may cross into C.
template <PyObject* (*function)(PyObject* const*, Py_ssize_t)>
PyObject* Guarded(PyObject*, PyObject* const* args, Py_ssize_t num_args) noexcept {
  try {
    return function(args, num_args);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::length_error&) {
    return PyErr_NoMemory();
  }
}

template <PyObject* (*function)(PyObject* const*, Py_ssize_t)>
PyMethodDef Method(const char* name, const char* signature) noexcept {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Guarded<function>)),
          METH_FASTCALL, signature};
}

int Execute(PyObject* module) noexcept {
  InitTokenIds();
  return PyModule_AddIntConstant(module, "ABI_VERSION", kAbiVersion) == 0 &&
                 PyModule_AddStringConstant(module, "SOURCE_DIGEST", KVTIER_SOURCE_DIGEST) == 0 &&
                 PyModule_AddStringConstant(module, "SHA256", BestSha256().name) == 0 &&
                 PyModule_AddIntConstant(module, "READS_LISTS_DIRECTLY", ReadsListsDirectly()) == 0
             ? 0
             : -1;
}

}  // namespace
}  // namespace kvtier

PyMODINIT_FUNC PyInit__core() {
  using namespace kvtier;
  static PyMethodDef methods[] = {
      Method<ChainKeysOf<false>>("chain_keys",
                                 "chain_keys(parent, token_ids, first_token, num_blocks, "
                                 "block_tokens, extras) -> list[bytes]"),
      Method<ChainKeysOf<true>>("chain_keys_portably",
                                "chain_keys, as it goes without special instructions or knowledge "
                                "of the interpreter; for tests"),
      Method<CopyBlocksOf>("copy_blocks",
                           "copy_blocks(paged, arena_address, arena_bytes, block_ids, "
                           "arena_offsets, to_arena) -> int"),
      Method<PrefaultOf>("prefault", "prefault(address, num_bytes) -> None"),
      Method<RingOpenOf>("ring_open", "ring_open(num_entries) -> ring"),
      Method<RingRegisterOf>("ring_register",
                             "ring_register(ring, slot, address, num_bytes) -> None"),
      Method<RingSubmitOf>("ring_submit",
                           "ring_submit(ring, token, is_read, fd, offset, buffers, slot) -> None"),
      Method<RingWakeOf>("ring_wake", "ring_wake(ring) -> None"),
      Method<RingWaitOf>("ring_wait", "ring_wait(ring, timeout_us) -> list[tuple[int, int]]"),
      Method<RingCloseOf>("ring_close", "ring_close(ring) -> None"),
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(&Execute)},
                                     {0, nullptr}};
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   "kvtier._core",
                                   "The compiled core of kvtier.",
                                   0,
                                   methods,
                                   slots,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  return PyModuleDef_Init(&definition);
}
