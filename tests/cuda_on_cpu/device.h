// A device of one thread at a time: what the kernels' text needs of a CUDA compiler, in C++.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct Index {
  unsigned int x;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};

inline float __uint_as_float(unsigned int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline unsigned int __float_as_uint(float value) {
  unsigned int bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// One call per thread, block after block: for kernels whose threads do not talk to each other.
template <class Kernel, class Parameters>
void run(Kernel kernel, const Parameters& parameters, unsigned int num_blocks, unsigned int num_threads) {
  gridDim.x = num_blocks;
  blockDim.x = num_threads;
  for (blockIdx.x = 0; blockIdx.x < num_blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < num_threads; ++threadIdx.x) {
      kernel(parameters);
    }
  }
}
