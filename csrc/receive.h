// Bytes from a socket into place, with the checksum of one buffer taken while they are in the cache.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "checksum.h"

namespace kvtier {

constexpr int kReceived = 0, kClosed = -1;  // else an errno

struct Limits {
  int64_t stall_us;  // most time in which no byte comes: EAGAIN
  int64_t total_us;  // for all of it: ETIMEDOUT
};

// Fills all of `buffers`, one behind the other, from a connected blocking socket. `digest` is of the
// buffer at `hashed`, which has kChecksumLeast bytes or more; `take` is how it is made.
int Receive(int fd, const std::vector<iovec>& buffers, size_t hashed, Limits limits,
            TakeStripes take, uint8_t digest[kChecksumBytes]);

}  // namespace kvtier
