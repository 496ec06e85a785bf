// Batched copies between paged memory and a flat arena.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvtier {

// One contiguous run of bytes per block: that of block b starts at base + b * stride.
struct Segment {
  uint8_t* base;
  size_t stride;
  size_t num_bytes;
};

struct BlockCopy {
  size_t block_id;
  uint8_t* in_arena;
};

// Copies each block's segments to (or from) `in_arena`, where they lie one after the other. All in
// all that is `total_bytes`.
void CopyBlocks(const std::vector<Segment>& segments, const std::vector<BlockCopy>& copies,
                size_t total_bytes, bool to_arena) noexcept;

}  // namespace kvtier
