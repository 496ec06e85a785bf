#include "sha256.h"

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace kvtier {

const uint32_t kShaInitialState[kShaStateWords] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                                   0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

namespace {

alignas(64) constexpr uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

inline uint32_t RotateRight(uint32_t x, int n) noexcept { return (x >> n) | (x << (32 - n)); }

inline uint32_t LoadBigEndian(const uint8_t* p) noexcept {
  return uint32_t{p[0]} << 24 | uint32_t{p[1]} << 16 | uint32_t{p[2]} << 8 | p[3];
}

// The first sixteen of `w` are the block's words; the others are made here.
void PortableRounds(uint32_t* state, uint32_t* w) noexcept {
  for (int i = 16; i < 64; ++i) {
    const uint32_t x = w[i - 15], y = w[i - 2];
    w[i] = w[i - 16] + (RotateRight(x, 7) ^ RotateRight(x, 18) ^ (x >> 3)) + w[i - 7] +
           (RotateRight(y, 17) ^ RotateRight(y, 19) ^ (y >> 10));
  }
  uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
  uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
  for (int i = 0; i < 64; ++i) {
    const uint32_t t1 = h + (RotateRight(e, 6) ^ RotateRight(e, 11) ^ RotateRight(e, 25)) +
                        ((e & f) ^ (~e & g)) + kRound[i] + w[i];
    const uint32_t t2 = (RotateRight(a, 2) ^ RotateRight(a, 13) ^ RotateRight(a, 22)) +
                        ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
  }
  state[0] += a, state[1] += b, state[2] += c, state[3] += d;
  state[4] += e, state[5] += f, state[6] += g, state[7] += h;
}

void PortableBlock(uint32_t* state, const uint8_t* data) noexcept {
  uint32_t w[64];
  for (int i = 0; i < 16; ++i) w[i] = LoadBigEndian(data + 4 * i);
  PortableRounds(state, w);
}

void PortableCompress(uint32_t* state, const uint8_t* data, size_t num_blocks) noexcept {
  for (; num_blocks > 0; --num_blocks, data += kShaBlockBytes) PortableBlock(state, data);
}

void PortableCompressTwo(uint32_t* state_a, const uint8_t* data_a, uint32_t* state_b,
                         const uint8_t* data_b, size_t num_blocks) noexcept {
  PortableCompress(state_a, data_a, num_blocks);
  PortableCompress(state_b, data_b, num_blocks);
}

void PortableLink(uint32_t* link, const uint32_t* state, const uint32_t* padding,
                  uint32_t* later_state, const uint8_t* later) noexcept {
  uint32_t digest[kShaStateWords], w[64];
  std::memcpy(digest, state, sizeof(digest));
  std::memcpy(w, link, kShaLinkWords * 4);
  std::memcpy(w + kShaLinkWords, padding, kShaPaddingWords * 4);
  PortableRounds(digest, w);
  std::memcpy(link, digest, kShaLinkWords * 4);
  if (later == nullptr) return;
  std::memcpy(later_state, kShaInitialState, sizeof(kShaInitialState));
  PortableBlock(later_state, later);
}

constexpr Sha256 kPortable = {"portable", PortableCompress, PortableCompressTwo, PortableLink};

#if defined(__x86_64__)

#define KVTIER_SHA_TARGET __attribute__((target("sha,sse4.1,ssse3")))

#define KVTIER_SHA_INLINE KVTIER_SHA_TARGET inline __attribute__((always_inline))

KVTIER_SHA_INLINE __m128i LoadWords(const void* source) noexcept {
  return _mm_loadu_si128(static_cast<const __m128i*>(source));
}

KVTIER_SHA_INLINE void StoreWords(void* target, __m128i words) noexcept {
  _mm_storeu_si128(static_cast<__m128i*>(target), words);
}

// Eight state words as the instructions keep them: {A,B,E,F} and {C,D,G,H}, highest lane first.
struct ShaState {
  __m128i abef, cdgh;
};

KVTIER_SHA_INLINE ShaState LoadState(const uint32_t* words) noexcept {
  const __m128i cdab = _mm_shuffle_epi32(LoadWords(words), 0xb1);
  const __m128i efgh = _mm_shuffle_epi32(LoadWords(words + 4), 0x1b);
  return {_mm_alignr_epi8(cdab, efgh, 8), _mm_blend_epi16(efgh, cdab, 0xf0)};
}

KVTIER_SHA_INLINE void StoreState(uint32_t* words, const ShaState& state) noexcept {
  const __m128i feba = _mm_shuffle_epi32(state.abef, 0x1b);
  const __m128i dchg = _mm_shuffle_epi32(state.cdgh, 0xb1);
  StoreWords(words, _mm_blend_epi16(feba, dchg, 0xf0));
  StoreWords(words + 4, _mm_alignr_epi8(dchg, feba, 8));
}

// A block of 64 bytes: its sixteen words, and later the last sixteen that were made of them.
struct ShaBlock {
  __m128i words[4];
};

KVTIER_SHA_INLINE ShaBlock LoadBlock(const uint8_t* data) noexcept {
  const __m128i byte_swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  ShaBlock block;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    block.words[i] = _mm_shuffle_epi8(LoadWords(data + 16 * i), byte_swap);
  return block;
}

template <int kLanes>
KVTIER_SHA_INLINE void ShaNiRounds(ShaState* states, ShaBlock* blocks) noexcept {
  ShaState before[kLanes];
#pragma GCC unroll 2
  for (int lane = 0; lane < kLanes; ++lane) before[lane] = states[lane];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {  // four rounds each
    const __m128i constants = _mm_load_si128(reinterpret_cast<const __m128i*>(kRound + 4 * i));
#pragma GCC unroll 2
    for (int lane = 0; lane < kLanes; ++lane) {
      __m128i* const w = blocks[lane].words;
      __m128i& next = w[i % 4];
      if (i >= 4) {
        const __m128i last = w[(i + 3) % 4];
        const __m128i partial = _mm_add_epi32(_mm_sha256msg1_epu32(next, w[(i + 1) % 4]),
                                              _mm_alignr_epi8(last, w[(i + 2) % 4], 4));
        next = _mm_sha256msg2_epu32(partial, last);
      }
      const __m128i input = _mm_add_epi32(next, constants);
      ShaState& state = states[lane];
      state.cdgh = _mm_sha256rnds2_epu32(state.cdgh, state.abef, input);
      state.abef =
          _mm_sha256rnds2_epu32(state.abef, state.cdgh, _mm_shuffle_epi32(input, 0x0e));
    }
  }
#pragma GCC unroll 2
  for (int lane = 0; lane < kLanes; ++lane) {
    states[lane].abef = _mm_add_epi32(states[lane].abef, before[lane].abef);
    states[lane].cdgh = _mm_add_epi32(states[lane].cdgh, before[lane].cdgh);
  }
}

template <int kLanes>
KVTIER_SHA_INLINE void ShaNi(uint32_t* const* states, const uint8_t* const* messages,
                             size_t num_blocks) noexcept {
  ShaState lanes[kLanes];
  ShaBlock blocks[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = LoadState(states[lane]);
  for (size_t block = 0; block < num_blocks; ++block) {
    for (int lane = 0; lane < kLanes; ++lane)
      blocks[lane] = LoadBlock(messages[lane] + block * kShaBlockBytes);
    ShaNiRounds<kLanes>(lanes, blocks);
  }
  for (int lane = 0; lane < kLanes; ++lane) StoreState(states[lane], lanes[lane]);
}

KVTIER_SHA_TARGET void ShaNiCompress(uint32_t* state, const uint8_t* data,
                                     size_t num_blocks) noexcept {
  ShaNi<1>(&state, &data, num_blocks);
}

KVTIER_SHA_TARGET void ShaNiCompressTwo(uint32_t* state_a, const uint8_t* data_a, uint32_t* state_b,
                                        const uint8_t* data_b, size_t num_blocks) noexcept {
  uint32_t* const states[2] = {state_a, state_b};
  const uint8_t* const messages[2] = {data_a, data_b};
  ShaNi<2>(states, messages, num_blocks);
}

KVTIER_SHA_TARGET void ShaNiLink(uint32_t* link, const uint32_t* state, const uint32_t* padding,
                                 uint32_t* later_state, const uint8_t* later) noexcept {
  ShaState lanes[2] = {LoadState(state), LoadState(kShaInitialState)};
  ShaBlock blocks[2] = {
      {{LoadWords(link), LoadWords(padding), LoadWords(padding + 4), LoadWords(padding + 8)}}, {}};
  if (later != nullptr) {
    blocks[1] = LoadBlock(later);
    ShaNiRounds<2>(lanes, blocks);
    StoreState(later_state, lanes[1]);
  } else {
    ShaNiRounds<1>(lanes, blocks);
  }
  const __m128i dcba = _mm_unpackhi_epi64(lanes[0].cdgh, lanes[0].abef);
  StoreWords(link, _mm_shuffle_epi32(dcba, 0x1b));
}

constexpr Sha256 kShaNi = {"sha-ni", ShaNiCompress, ShaNiCompressTwo, ShaNiLink};

bool HasShaNi() noexcept {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) return false;
  const bool has_ssse3 = (ecx & bit_SSSE3) != 0, has_sse41 = (ecx & bit_SSE4_1) != 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  return has_ssse3 && has_sse41 && (ebx & bit_SHA) != 0;
}

#endif

}  // namespace

const Sha256& PortableSha256() noexcept { return kPortable; }

const Sha256& BestSha256() noexcept {
#if defined(__x86_64__)
  static const bool has_sha_ni = HasShaNi();
  if (has_sha_ni) return kShaNi;
#endif
  return kPortable;
}

}  // namespace kvtier
