// The bulk copy engine of compute capability 9.0 and later, one function an instruction. Free of includes.
//
// One thread of a block calls all of them. Global addresses may be of host memory that is mapped into the device.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#error "bulk copies need compute capability 9.0"
#endif

namespace kvtier {

__device__ __forceinline__ unsigned int shared_address(const void* pointer) {
  return static_cast<unsigned int>(__cvta_generic_to_shared(pointer));
}

// A barrier for one arrival. The fence makes it known to the copy engine.
__device__ __forceinline__ void barrier_init(unsigned long long* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barriers_ready() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Starts global -> shared; the barrier's phase ends when all bytes are there.
__device__ __forceinline__ void bulk_load(void* shared, unsigned long long global, unsigned int num_bytes, unsigned long long* barrier) {
  const unsigned int to = shared_address(barrier);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(to), "r"(num_bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(shared)),
               "l"(global), "r"(num_bytes), "r"(to)
               : "memory");
}

// Waits for the end of the phase with this parity.
__device__ __forceinline__ void barrier_wait(unsigned long long* barrier, unsigned int parity) {
  unsigned int is_over = 0;
  while (is_over == 0) {
    asm volatile(
        "{ .reg .pred over; mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2; selp.u32 %0, 1, 0, over; }"
        : "=r"(is_over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// Starts shared -> global, as a group of its own.
__device__ __forceinline__ void bulk_store(unsigned long long global, const void* shared, unsigned int num_bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)), "r"(num_bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all stores but the last kNumLeft have read their shared memory.
template <int kNumLeft>
__device__ __forceinline__ void stores_have_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kNumLeft) : "memory");
}

// Waits until all stores are complete.
__device__ __forceinline__ void stores_are_complete() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace kvtier
