// The text of the kernels, compiled for the CPU, behind C functions.

#include "bulk_engine.h"
#include "device.h"

#include "../../csrc/cuda/paged_index.h"
#include "../../csrc/cuda/paged_copy.cu"
#include "../../csrc/cuda/bulk_copy.cu"
#include "../../csrc/cuda/row_index.h"
#include "../../csrc/cuda/float_formats.h"
#include "../../csrc/cuda/place_rows.cu"

alignas(128) unsigned char shared[1 << 20];

using kvtier::PagedCopy;
using kvtier::PlaceRows;
using kvtier::RowToken;
using kvtier::Segment;

extern "C" {

void run_paged_copy(const PagedCopy* copy, unsigned int num_blocks, unsigned int num_threads) {
  run(paged_copy, *copy, num_blocks, num_threads);
}

// Returns a BulkFault.
int run_bulk_copy(const PagedCopy* copy, unsigned int num_blocks, unsigned int num_threads, long long shared_bytes, int loads_are_late,
                  int stores_are_late) {
  engine.loads_are_late = loads_are_late != 0;
  engine.stores_are_late = stores_are_late != 0;
  engine.fault = kNoFault;
  engine.end_of_shared = shared + shared_bytes;
  gridDim.x = num_blocks;
  blockDim.x = num_threads;
  for (blockIdx.x = 0; blockIdx.x < num_blocks; ++blockIdx.x) {
    std::memset(shared, 0xdb, sizeof shared);
    engine.start_block();
    for (threadIdx.x = 0; threadIdx.x < num_threads; ++threadIdx.x) {
      engine.start_thread(threadIdx.x);
      bulk_copy(*copy);
      engine.stop_thread();
    }
  }
  return engine.fault;
}

void run_place_rows(int which, const PlaceRows* place, unsigned int num_blocks, unsigned int num_threads) {
  void (*const kernels[])(PlaceRows) = {place_neox_bf16,        place_neox_fp16,        place_neox_fp32,
                                        place_interleaved_bf16, place_interleaved_fp16, place_interleaved_fp32};
  run(kernels[which], *place, num_blocks, num_threads);
}

long long num_copy_items(const PagedCopy* copy) { return kvtier::num_items(*copy); }

void copy_item(const PagedCopy* copy, long long item, long long* out) {
  const kvtier::Piece piece = kvtier::piece_at(*copy, item);
  out[0] = static_cast<long long>(piece.paged);
  out[1] = static_cast<long long>(piece.contiguous);
  out[2] = piece.num_bytes;
}

void split(unsigned long long left, unsigned long long right, long long num_bytes, long long* out) {
  const kvtier::Split split = kvtier::split_of(left, right, num_bytes);
  out[0] = split.width;
  out[1] = split.head;
  out[2] = split.num_words;
  out[3] = split.tail;
}

// Offsets of the members in the order of their declaration, then the size.
int segment_layout(long long* out) {
  const size_t offsets[] = {offsetof(Segment, base),        offsetof(Segment, stride),      offsetof(Segment, num_bytes),
                            offsetof(Segment, slot_offset), offsetof(Segment, first_chunk), sizeof(Segment)};
  for (size_t offset : offsets) *out++ = static_cast<long long>(offset);
  return 6;
}

int paged_copy_layout(long long* out) {
  const size_t offsets[] = {offsetof(PagedCopy, segments),   offsetof(PagedCopy, contiguous), offsetof(PagedCopy, num_segments),
                            offsetof(PagedCopy, num_blocks), offsetof(PagedCopy, chunk_bytes), offsetof(PagedCopy, chunks_per_block),
                            offsetof(PagedCopy, to_paged),   offsetof(PagedCopy, num_stages), offsetof(PagedCopy, block_ids),
                            offsetof(PagedCopy, offsets),    sizeof(PagedCopy)};
  for (size_t offset : offsets) *out++ = static_cast<long long>(offset);
  return 11;
}

int row_token_layout(long long* out) {
  const size_t offsets[] = {offsetof(RowToken, from), offsetof(RowToken, to), offsetof(RowToken, turn), sizeof(RowToken)};
  for (size_t offset : offsets) *out++ = static_cast<long long>(offset);
  return 4;
}

int place_rows_layout(long long* out) {
  const size_t offsets[] = {offsetof(PlaceRows, source),         offsetof(PlaceRows, keys),
                            offsetof(PlaceRows, values),         offsetof(PlaceRows, tokens),
                            offsetof(PlaceRows, cos_sin),        offsetof(PlaceRows, num_tokens),
                            offsetof(PlaceRows, num_heads),      offsetof(PlaceRows, num_pairs),
                            offsetof(PlaceRows, value_offset),   offsetof(PlaceRows, source_head_stride),
                            offsetof(PlaceRows, target_head_stride), offsetof(PlaceRows, pairs_per_item),
                            sizeof(PlaceRows)};
  for (size_t offset : offsets) *out++ = static_cast<long long>(offset);
  return 13;
}

}  // extern "C"
