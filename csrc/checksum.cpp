#include "checksum.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvtier {

namespace {

constexpr uint64_t kPrime32A = 0x9E3779B1, kPrime32B = 0x85EBCA77, kPrime32C = 0xC2B2AE3D;
constexpr uint64_t kPrime64A = 0x9E3779B185EBCA87, kPrime64B = 0xC2B2AE3D27D4EB4F,
                   kPrime64C = 0x165667B19E3779F9, kPrime64D = 0x85EBCA77C2B2AE63,
                   kPrime64E = 0x27D4EB2F165667C5;
constexpr uint64_t kAvalanche = 0x165667919E3779F9;

constexpr size_t kStripeBytes = 64, kSecretStep = 8;
constexpr size_t kSecretBytes = 192;
constexpr size_t kBlockStripes = (kSecretBytes - kStripeBytes) / kSecretStep;
constexpr size_t kBlockBytes = kBlockStripes * kStripeBytes;
constexpr size_t kLastStripeShift = 7, kMergeShift = 11;

// The algorithm's own; with another one the checksums are others.
alignas(64) constexpr uint8_t kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

inline uint64_t Load(const uint8_t* p) noexcept {  // little-endian, as all that kvtier runs on
  uint64_t value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

void TakePortably(uint64_t* lanes, const uint8_t* data, const uint8_t* secret,
                  size_t num_stripes) noexcept {
  for (; num_stripes > 0; --num_stripes, data += kStripeBytes, secret += kSecretStep) {
    for (size_t i = 0; i < kChecksumLanes; ++i) {
      const uint64_t value = Load(data + 8 * i), keyed = value ^ Load(secret + 8 * i);
      lanes[i ^ 1] += value;
      lanes[i] += (keyed & 0xffffffff) * (keyed >> 32);
    }
  }
}

#if defined(__x86_64__)

__attribute__((target("avx2"))) inline __m256i TakeHalf(__m256i lanes, const uint8_t* data,
                                                        const uint8_t* secret) noexcept {
  const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
  const __m256i keyed = _mm256_xor_si256(
      value, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret)));
  const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
  const __m256i swapped = _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2));
  return _mm256_add_epi64(_mm256_add_epi64(lanes, swapped), product);
}

__attribute__((target("avx2"))) void TakeByAvx2(uint64_t* lanes, const uint8_t* data,
                                                const uint8_t* secret,
                                                size_t num_stripes) noexcept {
  __m256i* const stored = reinterpret_cast<__m256i*>(lanes);
  __m256i low = _mm256_loadu_si256(stored), high = _mm256_loadu_si256(stored + 1);
  for (; num_stripes > 0; --num_stripes, data += kStripeBytes, secret += kSecretStep) {
    low = TakeHalf(low, data, secret);
    high = TakeHalf(high, data + 32, secret + 32);
  }
  _mm256_storeu_si256(stored, low);
  _mm256_storeu_si256(stored + 1, high);
}

#endif

void Scramble(uint64_t* lanes) noexcept {
  const uint8_t* const secret = kSecret + kSecretBytes - kStripeBytes;
  for (size_t i = 0; i < kChecksumLanes; ++i) {
    lanes[i] = (lanes[i] ^ (lanes[i] >> 47) ^ Load(secret + 8 * i)) * kPrime32A;
  }
}

uint64_t Folded(uint64_t a, uint64_t b) noexcept {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t Merged(const uint64_t* lanes, const uint8_t* secret, uint64_t start) noexcept {
  for (size_t i = 0; i < kChecksumLanes; i += 2) {
    start += Folded(lanes[i] ^ Load(secret + 8 * i), lanes[i + 1] ^ Load(secret + 8 * i + 8));
  }
  start = (start ^ (start >> 37)) * kAvalanche;
  return start ^ (start >> 32);
}

void StoreBigEndian(uint64_t value, uint8_t* p) noexcept {
  for (int i = 7; i >= 0; --i, value >>= 8) p[i] = static_cast<uint8_t>(value);
}

}  // namespace

TakeStripes PortableTakeStripes() noexcept { return TakePortably; }

TakeStripes BestTakeStripes() noexcept {
#if defined(__x86_64__)
  static const TakeStripes best = __builtin_cpu_supports("avx2") ? TakeByAvx2 : TakePortably;
  return best;
#else
  return TakePortably;
#endif
}

Checksum::Checksum(TakeStripes take, const uint8_t* data, size_t num_bytes) noexcept
    : take_(take),
      data_(data),
      num_bytes_(num_bytes),
      lanes_{kPrime32C, kPrime64A, kPrime64B, kPrime64C, kPrime64D, kPrime32B, kPrime64E,
             kPrime32A} {}

void Checksum::Advance(size_t num_there) noexcept {
  const size_t last = (num_bytes_ - 1) / kBlockBytes * kBlockBytes;  // the rest is for the end
  while (num_taken_ < last && num_there - num_taken_ >= kBlockBytes) {
    take_(lanes_, data_ + num_taken_, kSecret, kBlockStripes);
    Scramble(lanes_);
    num_taken_ += kBlockBytes;
  }
}

void Checksum::Finish(uint8_t digest[kChecksumBytes]) noexcept {
  Advance(num_bytes_);
  take_(lanes_, data_ + num_taken_, kSecret, (num_bytes_ - 1 - num_taken_) / kStripeBytes);
  take_(lanes_, data_ + num_bytes_ - kStripeBytes,
        kSecret + kSecretBytes - kStripeBytes - kLastStripeShift, 1);
  const uint8_t* const far_secret = kSecret + kSecretBytes - kStripeBytes - kMergeShift;
  StoreBigEndian(Merged(lanes_, far_secret, ~(num_bytes_ * kPrime64B)), digest);
  StoreBigEndian(Merged(lanes_, kSecret + kMergeShift, num_bytes_ * kPrime64A), digest + 8);
}

}  // namespace kvtier
