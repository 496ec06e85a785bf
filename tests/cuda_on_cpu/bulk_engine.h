// The bulk copy engine at its most unkind: bytes move as early or as late as the instructions allow.
//
// A kernel that is right under all four combinations waits for everything that it must wait for.

#pragma once

#include <cmath>

#include "device.h"

enum BulkFault { kNoFault = 0, kUnaligned = 1, kBarrierInUse = 2, kWouldHang = 3, kNotReady = 4, kUnfinished = 5, kShared = 6 };

class BulkEngine {
 public:
  bool loads_are_late = false;
  bool stores_are_late = false;
  int fault = kNoFault;
  const unsigned char* end_of_shared = nullptr;  // what the launch asked for

  void start_block() { owned_.clear(); }

  // Every thread has its barriers and its groups of stores for itself.
  void start_thread(unsigned int thread) {
    thread_ = thread;
    barriers_.clear();
    stores_.clear();
    are_ready_ = false;
  }

  void init(unsigned long long* barrier) {
    own(barrier, sizeof *barrier);
    barriers_.push_back({barrier, 0, false, nullptr, nullptr, 0});
  }

  void ready() { are_ready_ = true; }

  void load(void* shared, const void* global, size_t num_bytes, unsigned long long* address) {
    Barrier* barrier = find(address);
    if (barrier == nullptr || !are_ready_) return fail(kNotReady);
    if (barrier->is_loading) return fail(kBarrierInUse);
    check(shared, global, num_bytes);
    own(shared, num_bytes);
    barrier->is_loading = true;
    barrier->to = shared;
    barrier->from = global;
    barrier->num_bytes = num_bytes;
    if (!loads_are_late) std::memcpy(shared, global, num_bytes);
  }

  void wait(unsigned long long* address, unsigned int parity) {
    Barrier* barrier = find(address);
    if (barrier == nullptr) return fail(kNotReady);
    if (barrier->is_loading && (barrier->phase & 1) == parity) {
      if (loads_are_late) std::memcpy(barrier->to, barrier->from, barrier->num_bytes);
      barrier->is_loading = false;
      ++barrier->phase;
    }
    if ((barrier->phase & 1) == parity) fail(kWouldHang);
  }

  void store(void* global, const void* shared, size_t num_bytes) {
    check(shared, global, num_bytes);
    stores_.push_back({global, shared, num_bytes});
    if (!stores_are_late) finish_stores(0);
  }

  void finish_stores(size_t num_left) {
    while (stores_.size() > num_left) {
      std::memcpy(stores_.front().to, stores_.front().from, stores_.front().num_bytes);
      stores_.erase(stores_.begin());
    }
  }

  void stop_thread() {
    if (!stores_.empty()) fail(kUnfinished);
    for (const Barrier& barrier : barriers_) {
      if (barrier.is_loading) fail(kUnfinished);
    }
  }

 private:
  struct Barrier {
    unsigned long long* address;
    unsigned int phase;
    bool is_loading;
    void* to;
    const void* from;
    size_t num_bytes;
  };
  struct Store {
    void* to;
    const void* from;
    size_t num_bytes;
  };

  struct Owned {
    uintptr_t begin;
    uintptr_t end;
    unsigned int thread;
  };

  // Threads run one after the other here, so two that use the same shared memory are only seen by comparing.
  void own(const void* shared, size_t num_bytes) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(shared);
    const Owned mine = {begin, begin + num_bytes, thread_};
    if (end_of_shared != nullptr && mine.end > reinterpret_cast<uintptr_t>(end_of_shared)) fail(kShared);
    for (const Owned& other : owned_) {
      if (other.thread != thread_ && mine.begin < other.end && other.begin < mine.end) fail(kShared);
    }
    owned_.push_back(mine);
  }

  Barrier* find(unsigned long long* address) {
    for (Barrier& barrier : barriers_) {
      if (barrier.address == address) return &barrier;
    }
    return nullptr;
  }

  void fail(int what) {
    if (fault == kNoFault) fault = what;
  }

  void check(const void* left, const void* right, size_t num_bytes) {
    if ((reinterpret_cast<uintptr_t>(left) | reinterpret_cast<uintptr_t>(right) | num_bytes) % 16 != 0) fail(kUnaligned);
  }

  std::vector<Barrier> barriers_;
  std::vector<Store> stores_;
  std::vector<Owned> owned_;
  unsigned int thread_ = 0;
  bool are_ready_ = false;
};

static BulkEngine engine;

namespace kvtier {

inline void barrier_init(unsigned long long* barrier) { engine.init(barrier); }
inline void barriers_ready() { engine.ready(); }
inline void bulk_load(void* shared, unsigned long long global, unsigned int num_bytes, unsigned long long* barrier) {
  engine.load(shared, reinterpret_cast<const void*>(global), num_bytes, barrier);
}
inline void barrier_wait(unsigned long long* barrier, unsigned int parity) { engine.wait(barrier, parity); }
inline void bulk_store(unsigned long long global, const void* shared, unsigned int num_bytes) {
  engine.store(reinterpret_cast<void*>(global), shared, num_bytes);
}
template <int kNumLeft>
void stores_have_read() {
  engine.finish_stores(kNumLeft);
}
inline void stores_are_complete() { engine.finish_stores(0); }

inline float float_of_half(unsigned short bits) {
  const int exponent = bits >> 10 & 31;
  const int fraction = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24) : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25));
}

// To nearest, ties to even, as the rounding mode of the process has it.
inline unsigned short half_of_float(float value) {
  const unsigned int sign = std::signbit(value) ? 0x8000u : 0u;
  if (std::isnan(value)) return 0x7fff;
  if (std::isinf(value)) return static_cast<unsigned short>(sign | 0x7c00u);
  const double magnitude = std::fabs(static_cast<double>(value));
  const int exponent = magnitude < std::ldexp(1.0, -14) ? -14 : std::ilogb(magnitude);
  const long steps = std::lrint(std::ldexp(magnitude, 10 - exponent));  // of 2^(exponent-10); at most 2048
  const long bits = exponent == -14 ? steps : (static_cast<long>(exponent + 14) << 10) + steps;
  return static_cast<unsigned short>(sign | static_cast<unsigned int>(bits < 0x7c00 ? bits : 0x7c00));
}

}  // namespace kvtier
