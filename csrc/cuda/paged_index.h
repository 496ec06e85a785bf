// Where the bytes of a batch of blocks lie: index arithmetic of the copy kernels.
//
// Free of includes. The device's compiler and any C++17 compiler read the same text, so the tests run
// this very arithmetic on the CPU. All indices have 64 bits.

#ifndef KVTIER_DEVICE
#define KVTIER_DEVICE static inline
#endif

namespace kvtier {

using i64 = long long;
using u64 = unsigned long long;

// One run of bytes per engine block. The table of all segments lies in device memory.
struct Segment {
  u64 base;          // address of block 0's first byte
  i64 stride;        // bytes from one block to the next
  i64 num_bytes;     // of one block's run
  i64 slot_offset;   // where the run lies in a slot
  i64 first_chunk;   // chunks of all segments before this one
};

constexpr int kMaxBlocks = 512;  // of one launch: the parameters of a kernel may take 32 KiB since CUDA 12.1

// Everything a copy kernel is told. Passed by value.
struct PagedCopy {
  u64 segments;          // Segment[num_segments]
  u64 contiguous;        // base of the arena or of a staging buffer
  i64 num_segments;
  i64 num_blocks;        // 1..kMaxBlocks
  i64 chunk_bytes;       // the most that one item copies; a multiple of 16
  i64 chunks_per_block;  // of all segments together
  i64 to_paged;          // 1: contiguous -> paged, 0: paged -> contiguous
  i64 num_stages;        // of the bulk kernel's ring in shared memory
  i64 block_ids[kMaxBlocks];
  i64 offsets[kMaxBlocks];  // of each block's slot, from `contiguous`
};

static_assert(sizeof(Segment) == 40, "Segment: see cuda_params.py");
static_assert(sizeof(PagedCopy) == 64 + 16 * kMaxBlocks, "PagedCopy: see cuda_params.py");

// One item: a chunk of one segment of one block.
struct Piece {
  u64 paged;
  u64 contiguous;
  i64 num_bytes;
};

// Position of the segment that holds `chunk`: the last one whose first chunk is not behind it.
KVTIER_DEVICE i64 segment_of(const Segment* segments, i64 num_segments, i64 chunk) {
  i64 low = 0;
  i64 high = num_segments;
  while (high - low > 1) {
    const i64 middle = (low + high) / 2;
    if (segments[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

KVTIER_DEVICE i64 num_items(const PagedCopy& copy) {
  return copy.num_blocks * copy.chunks_per_block;
}

// The item's bytes. The table may be a part of a layout's: its first chunk need not be 0, nor its first offset.
KVTIER_DEVICE Piece piece_at(const PagedCopy& copy, i64 item) {
  const Segment* segments = reinterpret_cast<const Segment*>(copy.segments);
  const i64 block = item / copy.chunks_per_block;
  const i64 chunk = item % copy.chunks_per_block + segments[0].first_chunk;
  const Segment segment = segments[segment_of(segments, copy.num_segments, chunk)];
  const i64 start = (chunk - segment.first_chunk) * copy.chunk_bytes;
  const i64 rest = segment.num_bytes - start;
  const i64 slot_offset = segment.slot_offset - segments[0].slot_offset;
  Piece piece;
  piece.paged = segment.base + static_cast<u64>(copy.block_ids[block] * segment.stride + start);
  piece.contiguous = copy.contiguous + static_cast<u64>(copy.offsets[block] + slot_offset + start);
  piece.num_bytes = rest < copy.chunk_bytes ? rest : copy.chunk_bytes;
  return piece;
}

// How to copy between two addresses with the widest accesses that both allow: `head` single bytes, then
// `num_words` of `width` bytes, then `tail` single bytes.
struct Split {
  i64 width;
  i64 head;
  i64 num_words;
  i64 tail;
};

KVTIER_DEVICE Split split_of(u64 left, u64 right, i64 num_bytes) {
  const u64 difference = left ^ right;
  Split split;
  split.width = (difference & 15) == 0 ? 16 : (difference & 7) == 0 ? 8 : (difference & 3) == 0 ? 4 : 1;
  split.head = static_cast<i64>((0 - left) & static_cast<u64>(split.width - 1));
  if (split.head > num_bytes) {
    split.head = num_bytes;
  }
  split.num_words = (num_bytes - split.head) / split.width;
  split.tail = num_bytes - split.head - split.num_words * split.width;
  return split;
}

}  // namespace kvtier
