#include "io_ring.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>

namespace kvtier {

namespace {

// The kernel's interface as of Linux 5.19. Declared here because older systems have older headers, or
// none; it never changes but by additions.
constexpr long kSetupCall = 425, kEnterCall = 426, kRegisterCall = 427;
constexpr uint32_t kFeatSingleMapping = 1u << 0, kFeatNoDrop = 1u << 1, kFeatSubmitStable = 1u << 2;
constexpr uint32_t kFeatExtraArgument = 1u << 8;
constexpr uint32_t kNeededFeatures =
    kFeatSingleMapping | kFeatNoDrop | kFeatSubmitStable | kFeatExtraArgument;
constexpr uint32_t kSetupClamp = 1u << 4;
constexpr uint64_t kRingsOffset = 0, kEntriesOffset = 0x10000000;
constexpr uint32_t kEnterGetEvents = 1u << 0, kEnterExtraArgument = 1u << 3;
constexpr uint32_t kRegisterBuffers2 = 15, kUpdateBuffers = 16, kSparse = 1u << 0;
constexpr uint8_t kNop = 0, kReadV = 1, kWriteV = 2, kReadFixed = 4, kWriteFixed = 5;

struct Params {
  uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd;
  uint32_t reserved[3];
  struct {
    uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, reserved;
    uint64_t user_address;
  } sq;
  struct {
    uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags, reserved;
    uint64_t user_address;
  } cq;
};
static_assert(sizeof(Params) == 120, "struct io_uring_params");

struct Entry {
  uint8_t opcode, flags;
  uint16_t priority;
  int32_t fd;
  uint64_t offset, address;
  uint32_t length, rw_flags;
  uint64_t user_data;
  uint16_t slot, personality;
  int32_t splice_fd;
  uint64_t reserved[2];
};
static_assert(sizeof(Entry) == 64, "struct io_uring_sqe");

struct Completion {
  uint64_t user_data;
  int32_t result;
  uint32_t flags;
};
static_assert(sizeof(Completion) == 16, "struct io_uring_cqe");

struct WaitArgument {
  uint64_t signal_mask;
  uint32_t signal_mask_bytes, min_wait_us;
  uint64_t timespec;
};

struct MemoryTable {
  uint32_t num_slots, flags;
  uint64_t reserved, data, tags;
};

struct MemoryUpdate {
  uint32_t first, reserved;
  uint64_t data, tags;
  uint32_t count, reserved2;
};

uint64_t Address(const void* pointer) noexcept { return reinterpret_cast<uintptr_t>(pointer); }

uint32_t LoadAcquire(const uint32_t* word) noexcept {
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

void StoreRelease(uint32_t* word, uint32_t value) noexcept {
  __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

uint32_t* Word(void* start, uint32_t offset) noexcept {
  return reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(start) + offset);
}

// Whether a descriptor is not a ring's: whoever closed it by mistake has opened something else since.
bool IsOfSomethingElse(int fd) noexcept {
  char path[32], target[64] = {};
  std::snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  if (readlink(path, target, sizeof target - 1) < 0) return false;
  return std::strcmp(target, "anon_inode:[io_uring]") != 0;
}

}  // namespace

int IoRing::Map(Mapping* mapping, size_t num_bytes, uint64_t offset) noexcept {
  void* const start = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                           fd_, static_cast<off_t>(offset));
  if (start == MAP_FAILED) return errno;
  *mapping = {start, num_bytes};
  madvise(start, num_bytes, MADV_DONTFORK);  // a child that used it would confuse the parent
  return 0;
}

int IoRing::Open(unsigned num_entries) noexcept {
  Params params = {};
  params.flags = kSetupClamp;
  num_forks_ = NumForks();
  fd_ = static_cast<int>(syscall(kSetupCall, num_entries, &params));
  if (fd_ < 0) return errno;
  if ((params.features & kNeededFeatures) != kNeededFeatures) {
    Close();
    return ENOSYS;
  }
  const size_t sq_bytes = params.sq.array + params.sq_entries * sizeof(uint32_t);
  const size_t cq_bytes = params.cq.cqes + params.cq_entries * sizeof(Completion);
  int error = Map(&rings_, sq_bytes > cq_bytes ? sq_bytes : cq_bytes, kRingsOffset);
  if (error == 0) error = Map(&entries_, params.sq_entries * sizeof(Entry), kEntriesOffset);
  if (error != 0) {
    Close();
    return error;
  }
  sq_head_ = Word(rings_.start, params.sq.head);
  sq_tail_ = Word(rings_.start, params.sq.tail);
  sq_array_ = Word(rings_.start, params.sq.array);
  sq_mask_ = *Word(rings_.start, params.sq.ring_mask);
  cq_head_ = Word(rings_.start, params.cq.head);
  cq_tail_ = Word(rings_.start, params.cq.tail);
  cq_mask_ = *Word(rings_.start, params.cq.ring_mask);
  cqes_ = static_cast<uint8_t*>(rings_.start) + params.cq.cqes;
  return 0;
}

void IoRing::Close() noexcept {
  const bool is_mapped = num_forks_ == NumForks();  // else something else may lie there by now
  for (Mapping* mapping : {&rings_, &entries_}) {
    if (is_mapped && mapping->start != nullptr) munmap(mapping->start, mapping->num_bytes);
    *mapping = {};
  }
  if (fd_ >= 0 && !IsOfSomethingElse(fd_)) close(fd_);
  fd_ = -1;
}

int IoRing::Register(unsigned slot, void* address, size_t num_bytes) noexcept {
  const std::lock_guard<std::mutex> lock(submitting_);
  if (!has_memory_table_) {
    MemoryTable table = {kNumMemorySlots, kSparse, 0, 0, 0};
    if (syscall(kRegisterCall, fd_, kRegisterBuffers2, &table, sizeof table) != 0) return errno;
    has_memory_table_ = true;
  }
  iovec memory = {address, num_bytes};
  MemoryUpdate update = {slot, 0, Address(&memory), 0, 1, 0};
  return syscall(kRegisterCall, fd_, kUpdateBuffers, &update, sizeof update) < 0 ? errno : 0;
}

int IoRing::Submit(uint8_t opcode, uint64_t token, int fd, uint64_t offset, const void* address,
                   uint32_t length, unsigned slot) noexcept {
  const std::lock_guard<std::mutex> lock(submitting_);
  const uint32_t tail = *sq_tail_;  // always empty here: every entry is handed over at once
  Entry* const entry = static_cast<Entry*>(entries_.start) + (tail & sq_mask_);
  std::memset(entry, 0, sizeof *entry);
  entry->opcode = opcode;
  entry->fd = fd;
  entry->offset = offset;
  entry->address = Address(address);
  entry->length = length;
  entry->user_data = token;
  entry->slot = static_cast<uint16_t>(slot);
  sq_array_[tail & sq_mask_] = tail & sq_mask_;
  StoreRelease(sq_tail_, tail + 1);
  for (;;) {
    if (syscall(kEnterCall, fd_, 1, 0, 0, nullptr, 0) == 1) return 0;
    const int error = errno;
    if (LoadAcquire(sq_head_) != tail) return 0;  // it was taken after all
    if (error == EINTR) continue;
    StoreRelease(sq_tail_, tail);  // nobody reads it but in the call above
    return error;
  }
}

int IoRing::Transfer(uint64_t token, bool is_read, int fd, uint64_t offset, const iovec* vector,
                     unsigned num_buffers) noexcept {
  return Submit(is_read ? kReadV : kWriteV, token, fd, offset, vector, num_buffers, 0);
}

int IoRing::TransferFixed(uint64_t token, bool is_read, int fd, uint64_t offset, void* address,
                          uint32_t num_bytes, unsigned slot) noexcept {
  return Submit(is_read ? kReadFixed : kWriteFixed, token, fd, offset, address, num_bytes, slot);
}

int IoRing::Wake() noexcept { return Submit(kNop, kWakeToken, -1, 0, nullptr, 0, 0); }

int IoRing::Wait(int64_t timeout_us, std::vector<RingCompletion>* completions) noexcept {
  if (LoadAcquire(cq_tail_) == *cq_head_) {
    struct {
      int64_t seconds;
      int64_t nanoseconds;
    } limit = {timeout_us / 1000000, timeout_us % 1000000 * 1000};
    WaitArgument argument = {0, _NSIG / 8, 0, timeout_us < 0 ? 0 : Address(&limit)};
    const long done = syscall(kEnterCall, fd_, 0, 1, kEnterGetEvents | kEnterExtraArgument,
                              &argument, sizeof argument);
    // EBUSY and EAGAIN: completions did not fit and will be there at the next call.
    if (done < 0 && errno != ETIME && errno != EINTR && errno != EBUSY && errno != EAGAIN) {
      return errno;
    }
  }
  uint32_t head = *cq_head_;
  for (const uint32_t tail = LoadAcquire(cq_tail_); head != tail; ++head) {
    Completion completion;
    std::memcpy(&completion, cqes_ + (head & cq_mask_) * sizeof completion, sizeof completion);
    completions->push_back({completion.user_data, completion.result});
  }
  StoreRelease(cq_head_, head);
  return 0;
}

}  // namespace kvtier
