// kvtier._core: what Python sees. kvtier/_core.pyi has the signatures, kvtier/_fallback.py says
// what each function does.

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#include "copy_calls.h"
#include "key_chain.h"
#include "python.h"
#include "receive_calls.h"
#include "ring_calls.h"
#include "token_ids.h"

namespace kvtier {
namespace {

constexpr long kAbiVersion =
    4;  // kvtier/_native.py asks for this one; change both with any signature or meaning

constexpr Py_ssize_t kTokensAtATime = 8192;  // read, then hashed while they are in the L1 cache

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

// Puts keys into a list that is as long as there are keys.
class KeyList {
 public:
  explicit KeyList(Py_ssize_t num_keys) noexcept : list_(PyList_New(num_keys)), is_well_(list_) {}

  bool is_well() const noexcept { return is_well_; }  // else a Python exception is set
  PyObject* release() noexcept { return is_well_ ? list_.release() : nullptr; }
  KeySink sink() noexcept { return {&Take, this}; }

 private:
  static void Take(void* self, const uint8_t* key) noexcept {
    static_cast<KeyList*>(self)->Add(key);
  }
  void Add(const uint8_t* key) noexcept {
    if (!is_well_) return;
    PyObject* const object =
        PyBytes_FromStringAndSize(reinterpret_cast<const char*>(key), kKeyBytes);
    // The list takes over the reference.
    is_well_ = object != nullptr && PyList_SetItem(list_.get(), size_++, object) == 0;
  }

  Ref list_;
  Py_ssize_t size_ = 0;
  bool is_well_;
};

PyObject* ChainInPieces(const Sha256& sha, const uint8_t* parent, TokenIds* token_ids,
                        Py_ssize_t first_token, Py_ssize_t num_blocks, Py_ssize_t block_tokens,
                        const Extras& extras) {
  const Py_ssize_t piece_blocks =
      std::min(num_blocks, std::max<Py_ssize_t>(2, kTokensAtATime / block_tokens / 2 * 2));
  std::vector<uint32_t> ids(static_cast<size_t>(piece_blocks * block_tokens));
  uint8_t previous[kKeyBytes];
  std::memcpy(previous, parent, kKeyBytes);
  KeyList keys(num_blocks);
  if (!keys.is_well()) return nullptr;
  for (Py_ssize_t block = 0; block < num_blocks; block += piece_blocks) {
    const Py_ssize_t num_here = std::min(piece_blocks, num_blocks - block);
    if (!token_ids->Read(first_token + block * block_tokens, num_here * block_tokens, ids.data()))
      return nullptr;
    const ExtraBytes extra_bytes = {
        extras.data.data(), extras.offsets.empty() ? nullptr : extras.offsets.data() + block};
    ChainKeys(sha, previous, ids.data(), num_here, block_tokens, extra_bytes, keys.sink());
    if (!keys.is_well()) return nullptr;
  }
  return keys.release();
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

// --- the module ---

// No C++ exception may cross into C. (Not noexcept: see WithoutGIL.)
template <PyObject* (*function)(PyObject* const*, Py_ssize_t)>
PyObject* Guarded(PyObject*, PyObject* const* args, Py_ssize_t num_args) {
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
                           "arena_offsets, to_arena, num_threads=1) -> int"),
      Method<ReceiveOf>("receive",
                        "receive(fd, buffers, hashed, stall_us, total_us) -> bytes | None"),
      Method<PortableReceiveOf>("receive_portably",
                                "receive, as it goes without special instructions; for tests"),
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
