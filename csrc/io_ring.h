// One io_uring: transfers between open files and memory, without a thread for each. The system calls
// alone; what is started when, and what becomes of short transfers, is decided in Python.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "forks.h"

namespace kvtier {

constexpr uint64_t kWakeToken = 0;  // of no transfer
constexpr unsigned kNumMemorySlots = 1u << 14;  // the most the kernel knows

struct RingCompletion {
  uint64_t token;
  int result;  // bytes, or a negative errno
};

// Functions return 0 or an errno. Any thread may submit; one at a time may wait. The child of a fork
// has neither the ring's memory nor its transfers: there the ring counts as closed.
class IoRing {
 public:
  IoRing() = default;
  ~IoRing() { Close(); }
  IoRing(const IoRing&) = delete;
  IoRing& operator=(const IoRing&) = delete;

  // Needs Linux 5.11, and leave to call io_uring.
  int Open(unsigned num_entries) noexcept;

  // Makes [address, address + num_bytes) memory slot `slot`: the kernel keeps its pages, so that a
  // transfer need not look them up. Needs Linux 5.19 and leave to lock memory.
  int Register(unsigned slot, void* address, size_t num_bytes) noexcept;

  // Starts a transfer. The vector may go when this returns, the memory when the transfer is over.
  int Transfer(uint64_t token, bool is_read, int fd, uint64_t offset, const iovec* vector,
               unsigned num_buffers) noexcept;

  // The same for one buffer inside of memory slot `slot`.
  int TransferFixed(uint64_t token, bool is_read, int fd, uint64_t offset, void* address,
                    uint32_t num_bytes, unsigned slot) noexcept;

  // Has Wait return.
  int Wake() noexcept;

  // Appends what is over, waiting for the first of it up to `timeout_us` (negative: without end).
  int Wait(int64_t timeout_us, std::vector<RingCompletion>* completions) noexcept;

  // Running transfers go on. Nobody may be in another function. Idempotent.
  void Close() noexcept;

  bool is_open() const noexcept { return fd_ >= 0 && num_forks_ == NumForks(); }

 private:
  struct Mapping {
    void* start = nullptr;
    size_t num_bytes = 0;
  };

  int Submit(uint8_t opcode, uint64_t token, int fd, uint64_t offset, const void* address,
             uint32_t length, unsigned slot) noexcept;
  int Map(Mapping* mapping, size_t num_bytes, uint64_t offset) noexcept;

  int fd_ = -1;
  unsigned num_forks_ = 0;
  std::mutex submitting_;
  Mapping rings_, entries_;
  uint32_t *sq_head_ = nullptr, *sq_tail_ = nullptr, *sq_array_ = nullptr;
  uint32_t *cq_head_ = nullptr, *cq_tail_ = nullptr;
  uint32_t sq_mask_ = 0, cq_mask_ = 0;
  uint8_t* cqes_ = nullptr;
  bool has_memory_table_ = false;
};

}  // namespace kvtier
