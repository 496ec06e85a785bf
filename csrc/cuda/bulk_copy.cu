// Copies straight between paged KV and pinned slots by the bulk copy engine, with a few one-warp blocks.
//
// Each block takes every gridDim.x-th chunk through a ring of stages in shared memory:
//
//   barriers | stage 0 | stage 1 | ... | stage num_stages-1        load n+num_stages-2 ... | wait load n | store n
//
// Every address and length must be a multiple of 16, and num_stages between 3 and 16. Needs: paged_index.h, bulk_primitives.h.

namespace kvtier {

constexpr int kMaxStages = 16;
constexpr int kStoresInFlight = 2;
constexpr int kBarrierBytes = 8 * kMaxStages;

struct Ring {
  unsigned char* shared;
  i64 num_stages;
  i64 stage_bytes;
};

__device__ __forceinline__ u64* barrier_of(const Ring& ring, i64 turn) {
  return reinterpret_cast<u64*>(ring.shared) + turn % ring.num_stages;
}

__device__ __forceinline__ unsigned char* stage_of(const Ring& ring, i64 turn) {
  return ring.shared + kBarrierBytes + turn % ring.num_stages * ring.stage_bytes;
}

__device__ __forceinline__ void start_load(const PagedCopy& copy, const Ring& ring, i64 turn) {
  const Piece piece = piece_at(copy, blockIdx.x + turn * gridDim.x);
  const u64 from = copy.to_paged ? piece.contiguous : piece.paged;
  bulk_load(stage_of(ring, turn), from, static_cast<unsigned int>(piece.num_bytes), barrier_of(ring, turn));
}

__device__ __forceinline__ void start_store(const PagedCopy& copy, const Ring& ring, i64 turn) {
  const Piece piece = piece_at(copy, blockIdx.x + turn * gridDim.x);
  const u64 to = copy.to_paged ? piece.paged : piece.contiguous;
  bulk_store(to, stage_of(ring, turn), static_cast<unsigned int>(piece.num_bytes));
}

}  // namespace kvtier

extern "C" __global__ void __launch_bounds__(32) bulk_copy(const __grid_constant__ kvtier::PagedCopy copy) {
  using namespace kvtier;
  extern __shared__ __align__(128) unsigned char shared[];
  const i64 num_turns = (num_items(copy) - static_cast<i64>(blockIdx.x) + gridDim.x - 1) / gridDim.x;
  if (threadIdx.x != 0 || num_turns <= 0) {
    return;
  }
  const Ring ring = {shared, copy.num_stages, copy.chunk_bytes};
  for (i64 stage = 0; stage < ring.num_stages; ++stage) {
    barrier_init(barrier_of(ring, stage));
  }
  barriers_ready();
  for (i64 turn = 0; turn < ring.num_stages && turn < num_turns; ++turn) {
    start_load(copy, ring, turn);
  }
  for (i64 turn = 0; turn < num_turns; ++turn) {
    barrier_wait(barrier_of(ring, turn), static_cast<unsigned int>(turn / ring.num_stages & 1));
    start_store(copy, ring, turn);
    stores_have_read<kStoresInFlight>();
    const i64 next = turn - kStoresInFlight + ring.num_stages;
    if (turn >= kStoresInFlight && next < num_turns) {
      start_load(copy, ring, next);
    }
  }
  stores_are_complete();
}
