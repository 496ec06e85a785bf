// XXH3 with 128 bits (Yann Collet; the algorithm's public specification) over bytes that come piece
// by piece into one place in memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvtier {

constexpr size_t kChecksumBytes = 16;
constexpr size_t kChecksumLeast = 241;  // shorter input is hashed in other ways, which nobody needs
constexpr size_t kChecksumLanes = 8;

// How `num_stripes` stripes of 64 bytes are taken in. `secret` goes on by 8 bytes a stripe.
using TakeStripes = void (*)(uint64_t* lanes, const uint8_t* data, const uint8_t* secret,
                             size_t num_stripes) noexcept;

// The best of this CPU; the portable one is for tests.
TakeStripes BestTakeStripes() noexcept;
TakeStripes PortableTakeStripes() noexcept;

class Checksum {
 public:
  // Of `num_bytes` >= kChecksumLeast at `data`, which has to stay until the end.
  Checksum(TakeStripes take, const uint8_t* data, size_t num_bytes) noexcept;

  // The first `num_there` bytes are in place. Reads those that are new.
  void Advance(size_t num_there) noexcept;

  // Once all bytes are there; in canonical order.
  void Finish(uint8_t digest[kChecksumBytes]) noexcept;

 private:
  TakeStripes take_;
  const uint8_t* data_;
  size_t num_bytes_;
  size_t num_taken_ = 0;  // in whole blocks
  uint64_t lanes_[kChecksumLanes];
};

}  // namespace kvtier
