// Gather and scatter between paged KV and contiguous memory (a staging buffer, or pinned host memory).
//
// One warp copies one chunk at a time. Needs: paged_index.h.

namespace kvtier {

constexpr int kWarp = 32;
constexpr int kUnrolled = 8;  // independent loads in flight a thread: with 16 bytes each, 4 KiB a warp

// `lane` is this thread's among the `kWarp` that share the words. The last words too are all under way at once.
template <class Word>
__device__ __forceinline__ void copy_words(u64 to, u64 from, i64 num_words, int lane) {
  Word* target = reinterpret_cast<Word*>(to) + lane;
  const Word* source = reinterpret_cast<const Word*>(from) + lane;
#pragma unroll 1
  for (int left = static_cast<int>(num_words) - lane; left > 0; left -= kUnrolled * kWarp) {
    Word words[kUnrolled] = {};
#pragma unroll
    for (int k = 0; k < kUnrolled; ++k) {
      if (k * kWarp < left) {
        words[k] = source[k * kWarp];
      }
    }
#pragma unroll
    for (int k = 0; k < kUnrolled; ++k) {
      if (k * kWarp < left) {
        target[k * kWarp] = words[k];
      }
    }
    source += kUnrolled * kWarp;
    target += kUnrolled * kWarp;
  }
}

__device__ __forceinline__ void copy_piece(u64 to, u64 from, i64 num_bytes, int lane) {
  const Split split = split_of(to, from, num_bytes);
  copy_words<unsigned char>(to, from, split.head, lane);
  const u64 body_to = to + split.head;
  const u64 body_from = from + split.head;
  if (split.width == 16) {
    copy_words<uint4>(body_to, body_from, split.num_words, lane);
  } else if (split.width == 8) {
    copy_words<u64>(body_to, body_from, split.num_words, lane);
  } else if (split.width == 4) {
    copy_words<unsigned int>(body_to, body_from, split.num_words, lane);
  } else {
    copy_words<unsigned char>(body_to, body_from, split.num_words, lane);
  }
  const i64 moved = num_bytes - split.tail;
  copy_words<unsigned char>(to + moved, from + moved, split.tail, lane);
}

}  // namespace kvtier

extern "C" __global__ void __launch_bounds__(512, 1) paged_copy(const __grid_constant__ kvtier::PagedCopy copy) {
  using namespace kvtier;
  const i64 thread = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  const i64 num_warps = static_cast<i64>(gridDim.x) * blockDim.x / kWarp;
  const int lane = static_cast<int>(thread % kWarp);
  for (i64 item = thread / kWarp; item < num_items(copy); item += num_warps) {
    const Piece piece = piece_at(copy, item);
    if (copy.to_paged) {
      copy_piece(piece.paged, piece.contiguous, piece.num_bytes, lane);
    } else {
      copy_piece(piece.contiguous, piece.paged, piece.num_bytes, lane);
    }
  }
}
