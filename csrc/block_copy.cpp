#include "block_copy.h"

#include <cstring>

namespace kvtier {

void CopyBlocks(const std::vector<Segment>& segments, const std::vector<BlockCopy>& copies,
                bool to_arena) noexcept {
  for (const BlockCopy& copy : copies) {
    uint8_t* in_arena = copy.in_arena;
    for (const Segment& segment : segments) {
      uint8_t* in_pages = segment.base + copy.block_id * segment.stride;
      if (to_arena) {
        std::memcpy(in_arena, in_pages, segment.num_bytes);
      } else {
        std::memcpy(in_pages, in_arena, segment.num_bytes);
      }
      in_arena += segment.num_bytes;
    }
  }
}

}  // namespace kvtier
