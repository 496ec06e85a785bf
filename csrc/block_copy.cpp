#include "block_copy.h"

#include <algorithm>
#include <utility>

#include "copy_threads.h"

namespace kvtier {

namespace {

// From here on a batch goes past the caches. They are larger; but what is stored is not read again
// soon, what is loaded is read layer by layer between weights that fill every cache, and copying in
// lanes is twice as fast as memcpy even at this size.
constexpr size_t kStreamBytes = size_t{256} << 10;
// From here on it is worth waking other threads.
constexpr size_t kShareBytes = size_t{4} << 20;
// What one thread takes at a time: long against taking it, short against the whole.
constexpr size_t kTaskBytes = size_t{512} << 10;
// No piece is longer, so that a batch of few long ones can be shared out, and copied in lanes.
constexpr size_t kMaxPieceBytes = size_t{64} << 10;

// Puts a batch into the order of paged memory, and deals a gather's blocks out to the lanes so that
// each lane runs through a stretch of them: pieces that follow each other in a lane then lie as near
// to each other as they can.
std::vector<BlockCopy> Ordered(std::vector<BlockCopy> copies, Direction direction) {
  std::sort(copies.begin(), copies.end(), [](const BlockCopy& left, const BlockCopy& right) {
    return left.block_id < right.block_id;
  });
  if (direction == Direction::kFromArena) return copies;
  std::vector<BlockCopy> dealt;
  dealt.reserve(copies.size());
  const size_t num_rows = (copies.size() + kLanes - 1) / kLanes;
  for (size_t row = 0; row < num_rows; ++row) {
    for (size_t i = row; i < copies.size(); i += num_rows) dealt.push_back(copies[i]);
  }
  return dealt;
}

std::vector<Segment> Divided(const std::vector<Segment>& segments) {
  std::vector<Segment> pieces;
  pieces.reserve(segments.size());
  for (const Segment& segment : segments) {
    for (size_t start = 0; start < segment.num_bytes; start += kMaxPieceBytes) {
      pieces.push_back({segment.base + start, segment.stride,
                        std::min(kMaxPieceBytes, segment.num_bytes - start),
                        segment.offset + start});
    }
  }
  return pieces;
}

}  // namespace

CopyBatch::CopyBatch(const std::vector<Segment>& segments, std::vector<BlockCopy> copies,
                     Direction direction)
    : segments_(copies.empty() ? std::vector<Segment>() : Divided(segments)),
      copies_(Ordered(std::move(copies), direction)),
      direction_(direction) {
  if (copies_.empty()) return;
  // The side that is read decides which pieces are neighbours, for reads are waited for and writes
  // are not. Read from pages: all blocks of one segment, one stretch of memory as far as it goes.
  // Read from the arena: one block in each lane.
  tile_blocks_ = direction == Direction::kToArena ? copies_.size() : std::min(kLanes, copies_.size());
  size_t block_bytes = 0;
  for (const Segment& segment : segments_) block_bytes += segment.num_bytes;
  num_bytes_ = block_bytes * copies_.size();
  const size_t group_bytes = block_bytes * kLanes / segments_.size();
  task_pieces_ = kLanes * std::max<size_t>(1, kTaskBytes / std::max<size_t>(1, group_bytes));
}

// Walks over the pieces. (Finding each by its number takes four divisions, a tenth of the time of
// copying a small one.)
class CopyBatch::Cursor {
 public:
  Cursor(const CopyBatch& batch, size_t piece) noexcept : batch_(batch) {
    const size_t tile_pieces = batch.tile_blocks_ * batch.segments_.size();
    OpenTile(piece / tile_pieces * batch.tile_blocks_);
    segment_ = batch.segments_.data() + piece % tile_pieces / tile_blocks_;
    block_ = tile_ + piece % tile_pieces % tile_blocks_;
  }

  Piece Next() noexcept {
    uint8_t* in_pages = segment_->base + block_->block_id * segment_->stride;
    uint8_t* in_arena = block_->in_arena + segment_->offset;
    const size_t num_bytes = segment_->num_bytes;
    if (++block_ == tile_ + tile_blocks_) {
      block_ = tile_;
      if (++segment_ == batch_.segments_.data() + batch_.segments_.size()) {
        OpenTile(static_cast<size_t>(tile_ - batch_.copies_.data()) + tile_blocks_);
      }
    }
    return batch_.direction_ == Direction::kToArena ? Piece{in_arena, in_pages, num_bytes}
                                                    : Piece{in_pages, in_arena, num_bytes};
  }

 private:
  void OpenTile(size_t first_block) noexcept {
    tile_ = block_ = batch_.copies_.data() + first_block;
    tile_blocks_ = std::min(batch_.tile_blocks_, batch_.copies_.size() - first_block);
    segment_ = batch_.segments_.data();
  }

  const CopyBatch& batch_;
  const BlockCopy* tile_ = nullptr;
  size_t tile_blocks_ = 0;
  const Segment* segment_ = nullptr;
  const BlockCopy* block_ = nullptr;
};

void CopyBatch::RunTask(size_t index, CopyPieces copy) const noexcept {
  const size_t first = index * task_pieces_, end = std::min(first + task_pieces_, num_pieces());
  Cursor cursor(*this, first);
  Piece pieces[kLanes];
  for (size_t i = first; i < end; i += kLanes) {
    const size_t count = std::min(kLanes, end - i);
    for (size_t lane = 0; lane < count; ++lane) pieces[lane] = cursor.Next();
    copy(pieces, count);
  }
}

void CopyBatch::Run(size_t num_threads) const noexcept {
  if (num_bytes_ < kStreamBytes) {
    for (size_t i = 0; i < num_tasks(); ++i) RunTask(i, CopyPlainly);
    return;
  }
  struct Context {
    const CopyBatch* batch;
    CopyPieces copy;
  } context = {this, BestStreamCopy()};
  auto run = [](void* of, size_t index) {
    const Context* context = static_cast<Context*>(of);
    context->batch->RunTask(index, context->copy);
    EndStreaming();
  };
  RunTasks(num_tasks(), num_bytes_ < kShareBytes ? 1 : num_threads, run, &context);
}

}  // namespace kvtier
