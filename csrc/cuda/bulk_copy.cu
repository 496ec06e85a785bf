// Copies straight between paged KV and pinned slots by the bulk copy engine, with a few small blocks.
//
// Every warp works for itself, so that the index arithmetic of some overlaps the waiting of others: its first thread takes every
// num_warps-th chunk of the launch through a ring of stages in shared memory:
//
//   shared:  Stage of warp 0's stage 0, 1, ..., of warp 1's ...  |  bytes of warp 0's stage 0, 1, ..., of warp 1's ...
//   warp:    load n ... n+num_stages-1 | wait load n, store n | store n-1 has been read, load n+num_stages-1 | wait load n+1 ...
//
// Every address and length must be a multiple of 16, and num_stages at least 2. Needs: paged_index.h, bulk_primitives.h.

namespace kvtier {

constexpr int kThreadsOfWarp = 32;
constexpr int kStoresInFlight = 1;

// What the copy engine is told of one stage, and what its store needs once the load has arrived.
struct Stage {
  u64 barrier;
  u64 to;
  i64 num_bytes;
  i64 reserved;
};

static_assert(sizeof(Stage) == 32, "Stage: see cuda_ways.py");

// The stages of one warp.
struct Ring {
  Stage* stages;
  unsigned char* bytes;
  unsigned int num_stages;
  unsigned int stage_bytes;
};

// A position in the ring, and the parity of how often it went round.
struct Turn {
  unsigned int stage = 0;
  unsigned int parity = 0;
};

__device__ __forceinline__ void advance(Turn& turn, const Ring& ring) {
  if (++turn.stage == ring.num_stages) {
    turn.stage = 0;
    turn.parity ^= 1u;
  }
}

__device__ __forceinline__ void start_load(const PagedCopy& copy, const Ring& ring, const Turn& turn, i64 item) {
  const Piece piece = piece_at(copy, item);
  Stage& stage = ring.stages[turn.stage];
  stage.to = copy.to_paged ? piece.paged : piece.contiguous;
  stage.num_bytes = piece.num_bytes;
  const u64 from = copy.to_paged ? piece.contiguous : piece.paged;
  bulk_load(ring.bytes + turn.stage * ring.stage_bytes, from, static_cast<unsigned int>(piece.num_bytes), &stage.barrier);
}

__device__ __forceinline__ void start_store(const Ring& ring, const Turn& turn) {
  Stage& stage = ring.stages[turn.stage];
  barrier_wait(&stage.barrier, turn.parity);
  bulk_store(stage.to, ring.bytes + turn.stage * ring.stage_bytes, static_cast<unsigned int>(stage.num_bytes));
}

}  // namespace kvtier

extern "C" __global__ void __launch_bounds__(512) bulk_copy(const __grid_constant__ kvtier::PagedCopy copy) {
  using namespace kvtier;
  extern __shared__ __align__(128) unsigned char shared[];
  const unsigned int warp = threadIdx.x / kThreadsOfWarp;
  const unsigned int warps_of_block = blockDim.x / kThreadsOfWarp;
  const i64 first = static_cast<i64>(blockIdx.x) * warps_of_block + warp;
  const i64 num_warps = static_cast<i64>(gridDim.x) * warps_of_block;
  const i64 end = num_items(copy);
  if (threadIdx.x % kThreadsOfWarp != 0 || first >= end) {
    return;
  }
  const unsigned int num_stages = static_cast<unsigned int>(copy.num_stages);
  const unsigned int stage_bytes = static_cast<unsigned int>(copy.chunk_bytes);
  unsigned char* bytes = shared + warps_of_block * num_stages * sizeof(Stage);
  const Ring ring = {reinterpret_cast<Stage*>(shared) + warp * num_stages, bytes + warp * num_stages * stage_bytes, num_stages, stage_bytes};
  for (unsigned int stage = 0; stage < num_stages; ++stage) {
    barrier_init(&ring.stages[stage].barrier);
  }
  barriers_ready();
  Turn loading;
  Turn storing;
  i64 next = first;  // to be loaded
  for (unsigned int stage = 0; stage < num_stages && next < end; ++stage, next += num_warps) {
    start_load(copy, ring, loading, next);
    advance(loading, ring);
  }
  for (i64 item = first; item < end; item += num_warps) {
    start_store(ring, storing);
    advance(storing, ring);
    stores_have_read<kStoresInFlight>();
    if (item != first && next < end) {
      start_load(copy, ring, loading, next);
      advance(loading, ring);
      next += num_warps;
    }
  }
  stores_are_complete();
}
