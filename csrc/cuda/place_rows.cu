// Puts the rows of chunks into a prompt's KV and turns their keys by position differences on the way, in fp32: once, by the
// difference, not back and forth.
//
// The cosines and sines come from the host, which computes the angles in fp64. Compiled with --fmad=false, so that the
// result has the same bits everywhere. Needs: row_index.h, half_primitives.h, float_formats.h.

namespace kvtier {

template <class Storage, int kNum>
struct alignas(sizeof(Storage) * kNum) Vector {
  Storage values[kNum];
};

struct Rotated {
  float first;
  float second;
};

__device__ __forceinline__ Rotated rotate(float first, float second, float cosine, float sine) {
  return {first * cosine - second * sine, second * cosine + first * sine};
}

// The two places of `kNum` neighbouring pairs, as numbers of elements: interleaved pairs lie in both places together.
template <int kNum, bool kIsInterleaved>
struct Places {
  i64 left;
  i64 right;
  __device__ __forceinline__ Places(i64 first_pair, i64 num_pairs)
      : left(kIsInterleaved ? 2 * first_pair : first_pair), right(kIsInterleaved ? left + kNum : first_pair + num_pairs) {}
};

template <class Format, bool kIsInterleaved, int kNum>
__device__ __forceinline__ void place_item(const RowItem& item, i64 num_pairs, const float* table) {
  using Storage = typename Format::Storage;
  using Some = Vector<Storage, kNum>;
  const Places<kNum, kIsInterleaved> places(item.first_pair, num_pairs);
  const i64 at[2] = {places.left, places.right};
  Some before[2];
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    before[side] = *reinterpret_cast<const Some*>(reinterpret_cast<const Storage*>(item.from_key) + at[side]);
    const Some value = *reinterpret_cast<const Some*>(reinterpret_cast<const Storage*>(item.from_value) + at[side]);
    *reinterpret_cast<Some*>(reinterpret_cast<Storage*>(item.to_value) + at[side]) = value;
  }
  Some after[2] = {before[0], before[1]};
  if (item.turn >= 0) {
    const float* cos_sin = table + 2 * (item.turn * num_pairs + item.first_pair);
#pragma unroll
    for (int k = 0; k < kNum; ++k) {
      // interleaved: 0 1 | 2 3 || 4 5 | 6 7 are the pairs; else: 0 1 2 3 in the left and their partners in the right
      const int first = kIsInterleaved ? 2 * k : k;
      const int second = kIsInterleaved ? 2 * k + 1 : kNum + k;
      const Rotated rotated = rotate(Format::load(before[first / kNum].values[first % kNum]),
                                     Format::load(before[second / kNum].values[second % kNum]), cos_sin[2 * k], cos_sin[2 * k + 1]);
      after[first / kNum].values[first % kNum] = Format::store(rotated.first);
      after[second / kNum].values[second % kNum] = Format::store(rotated.second);
    }
  }
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    *reinterpret_cast<Some*>(reinterpret_cast<Storage*>(item.to_key) + at[side]) = after[side];
  }
}

template <class Format, bool kIsInterleaved>
__device__ __forceinline__ void place_all(const PlaceRows& place) {
  const i64 num_threads = static_cast<i64>(gridDim.x) * blockDim.x;
  const float* table = reinterpret_cast<const float*>(place.cos_sin);
  for (i64 index = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; index < num_items(place); index += num_threads) {
    const RowItem item = item_at(place, index);
    if (place.pairs_per_item == 4) {
      place_item<Format, kIsInterleaved, 4>(item, place.num_pairs, table);
    } else {
      place_item<Format, kIsInterleaved, 1>(item, place.num_pairs, table);
    }
  }
}

}  // namespace kvtier

// Six blocks on a multiprocessor: with no number given the compiler for 10.0 saves registers and spills one.
#define KVTIER_PLACE(name, format, is_interleaved)                                                                  \
  extern "C" __global__ void __launch_bounds__(256, 6) name(const __grid_constant__ kvtier::PlaceRows place) {          \
    kvtier::place_all<kvtier::format, is_interleaved>(place);                                                        \
  }

KVTIER_PLACE(place_neox_bf16, BFloat16, false)
KVTIER_PLACE(place_neox_fp16, Float16, false)
KVTIER_PLACE(place_neox_fp32, Float32, false)
KVTIER_PLACE(place_interleaved_bf16, BFloat16, true)
KVTIER_PLACE(place_interleaved_fp16, Float16, true)
KVTIER_PLACE(place_interleaved_fp32, Float32, true)
