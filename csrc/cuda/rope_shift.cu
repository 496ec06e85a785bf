// Rotates K in place by position differences, in fp32: once, by the difference, not back and forth.
//
// The cosines and sines come from the host, which computes the angles in fp64. Compiled with --fmad=false, so that the
// result has the same bits everywhere. Needs: rope_index.h, half_primitives.h, float_formats.h.

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

// Four pairs at a time; the dimensions lie side by side, aligned to four of them.
template <class Format, bool kIsInterleaved>
__device__ __forceinline__ void rotate_four(const RopeItem& item, i64 num_pairs, const float* cos_sin) {
  using Storage = typename Format::Storage;
  using Four = Vector<Storage, 4>;
  Storage* head = reinterpret_cast<Storage*>(item.address);
  Four* left = reinterpret_cast<Four*>(head + (kIsInterleaved ? 2 * item.first_pair : item.first_pair));
  Four* right = kIsInterleaved ? left + 1 : reinterpret_cast<Four*>(head + num_pairs + item.first_pair);
  const Four before[2] = {*left, *right};
  Four after[2];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    // interleaved: 0 1 | 2 3 || 4 5 | 6 7 are the pairs; else: 0 1 2 3 in the left and their partners in the right
    const int first = kIsInterleaved ? 2 * k : k;
    const int second = kIsInterleaved ? 2 * k + 1 : 4 + k;
    const Rotated rotated = rotate(Format::load(before[first / 4].values[first % 4]), Format::load(before[second / 4].values[second % 4]),
                                   cos_sin[2 * k], cos_sin[2 * k + 1]);
    after[first / 4].values[first % 4] = Format::store(rotated.first);
    after[second / 4].values[second % 4] = Format::store(rotated.second);
  }
  *left = after[0];
  *right = after[1];
}

// One pair, wherever its two dimensions lie.
template <class Format, bool kIsInterleaved>
__device__ __forceinline__ void rotate_one(const RopeShift& shift, const RopeItem& item, const float* cos_sin) {
  using Storage = typename Format::Storage;
  const i64 first = kIsInterleaved ? 2 * item.first_pair : item.first_pair;
  const i64 second = kIsInterleaved ? first + 1 : first + shift.num_pairs;
  Storage* left = reinterpret_cast<Storage*>(item.address + static_cast<u64>(first * shift.dim_stride));
  Storage* right = reinterpret_cast<Storage*>(item.address + static_cast<u64>(second * shift.dim_stride));
  const Rotated rotated = rotate(Format::load(*left), Format::load(*right), cos_sin[0], cos_sin[1]);
  *left = Format::store(rotated.first);
  *right = Format::store(rotated.second);
}

template <class Format, bool kIsInterleaved>
__device__ __forceinline__ void shift_all(const RopeShift& shift) {
  const i64 num_threads = static_cast<i64>(gridDim.x) * blockDim.x;
  const float* table = reinterpret_cast<const float*>(shift.cos_sin);
  for (i64 index = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; index < num_items(shift); index += num_threads) {
    const RopeItem item = item_at(shift, index);
    if (item.num_pairs == 0) {
      continue;
    }
    const float* cos_sin = table + 2 * (item.row * shift.num_pairs + item.first_pair);
    if (shift.pairs_per_item == 4) {
      rotate_four<Format, kIsInterleaved>(item, shift.num_pairs, cos_sin);
    } else {
      rotate_one<Format, kIsInterleaved>(shift, item, cos_sin);
    }
  }
}

}  // namespace kvtier

#define KVTIER_ROPE(name, format, is_interleaved)                                                                   \
  extern "C" __global__ void __launch_bounds__(256) name(const __grid_constant__ kvtier::RopeShift shift) {          \
    kvtier::shift_all<kvtier::format, is_interleaved>(shift);                                                        \
  }

KVTIER_ROPE(rope_neox_bf16, BFloat16, false)
KVTIER_ROPE(rope_neox_fp16, Float16, false)
KVTIER_ROPE(rope_neox_fp32, Float32, false)
KVTIER_ROPE(rope_interleaved_bf16, BFloat16, true)
KVTIER_ROPE(rope_interleaved_fp16, Float16, true)
KVTIER_ROPE(rope_interleaved_fp32, Float32, true)
