// Batched copies between paged memory and a flat arena.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "stream_copy.h"

namespace kvtier {

// One contiguous run of bytes per block: that of block b starts at base + b * stride. In the arena
// it lies `offset` bytes behind the block's start.
struct Segment {
  uint8_t* base;
  size_t stride;
  size_t num_bytes;
  size_t offset;
};

struct BlockCopy {
  size_t block_id;
  uint8_t* in_arena;
};

enum class Direction { kToArena, kFromArena };

// All pieces of a batch, numbered: tile of blocks by tile of blocks, in each of them segment by
// segment, in each of those block by block.
class CopyBatch {
 public:
  // No two targets overlap.
  CopyBatch(const std::vector<Segment>& segments, std::vector<BlockCopy> copies,
            Direction direction);

  size_t num_bytes() const noexcept { return num_bytes_; }

  // Copies, on up to `num_threads` threads.
  void Run(size_t num_threads) const noexcept;

 private:
  class Cursor;

  size_t num_pieces() const noexcept { return segments_.size() * copies_.size(); }
  size_t num_tasks() const noexcept { return (num_pieces() + task_pieces_ - 1) / task_pieces_; }
  void RunTask(size_t index, CopyPieces copy) const noexcept;

  std::vector<Segment> segments_;
  std::vector<BlockCopy> copies_;
  Direction direction_;
  size_t num_bytes_ = 0;
  size_t tile_blocks_ = 1;
  size_t task_pieces_ = 1;
};

}  // namespace kvtier
