// How KV elements are stored, and fp32 from and to them. Free of includes; needs half_primitives.h.

namespace kvtier {

struct Float32 {
  using Storage = float;
  __device__ static __forceinline__ float load(float value) { return value; }
  __device__ static __forceinline__ float store(float value) { return value; }
};

struct Float16 {
  using Storage = unsigned short;
  __device__ static __forceinline__ float load(unsigned short bits) { return float_of_half(bits); }
  __device__ static __forceinline__ unsigned short store(float value) { return half_of_float(value); }
};

// By hand, because devices before 8.0 have no such conversion. To nearest, ties to even; a NaN stays one.
struct BFloat16 {
  using Storage = unsigned short;
  __device__ static __forceinline__ float load(unsigned short bits) { return __uint_as_float(static_cast<unsigned int>(bits) << 16); }
  __device__ static __forceinline__ unsigned short store(float value) {
    const unsigned int bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
      return static_cast<unsigned short>(bits >> 16 | 0x40u);
    }
    return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
};

}  // namespace kvtier
