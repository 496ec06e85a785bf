#include "block_copy.h"

#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace kvtier {

namespace {

// From here on a batch is too large to stay in the caches until somebody reads it.
constexpr size_t kStreamBytes = size_t{4} << 20;
constexpr size_t kLineBytes = 64;
constexpr size_t kPrefetchBytes = 1024;
constexpr size_t kPrefetchSegments = 2;  // ahead

#if defined(__SSE2__)

// memcpy past the caches: the target's lines need not be read before they are written.
void StreamCopy(uint8_t* target, const uint8_t* source, size_t num_bytes) noexcept {
  size_t head = -reinterpret_cast<uintptr_t>(target) % kLineBytes;
  if (head > num_bytes) head = num_bytes;
  std::memcpy(target, source, head);
  target += head, source += head, num_bytes -= head;
  for (; num_bytes >= kLineBytes;
       target += kLineBytes, source += kLineBytes, num_bytes -= kLineBytes) {
    const __m128i* from = reinterpret_cast<const __m128i*>(source);
    __m128i* to = reinterpret_cast<__m128i*>(target);
    const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
    const __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
    _mm_stream_si128(to, a);
    _mm_stream_si128(to + 1, b);
    _mm_stream_si128(to + 2, c);
    _mm_stream_si128(to + 3, d);
  }
  std::memcpy(target, source, num_bytes);
}

void EndStreaming() noexcept { _mm_sfence(); }  // orders the stores before everything that follows

#else

void StreamCopy(uint8_t* target, const uint8_t* source, size_t num_bytes) noexcept {
  std::memcpy(target, source, num_bytes);
}

void EndStreaming() noexcept {}

#endif

// The first bytes of a piece that is copied soon. Pieces of paged memory lie far apart, so the
// hardware does not see them coming.
void Prefetch(const uint8_t* piece, size_t num_bytes) noexcept {
  const uint8_t* end = piece + (num_bytes < kPrefetchBytes ? num_bytes : kPrefetchBytes);
  for (; piece < end; piece += kLineBytes) __builtin_prefetch(piece);
}

inline void CopyBytes(uint8_t* target, const uint8_t* source, size_t num_bytes,
                      bool is_large) noexcept {
  if (is_large) {
    StreamCopy(target, source, num_bytes);
  } else {
    std::memcpy(target, source, num_bytes);
  }
}

}  // namespace

void CopyBlocks(const std::vector<Segment>& segments, const std::vector<BlockCopy>& copies,
                size_t total_bytes, bool to_arena) noexcept {
  const bool is_large = total_bytes >= kStreamBytes;
  for (const BlockCopy& copy : copies) {
    uint8_t* in_arena = copy.in_arena;
    for (size_t i = 0; i < segments.size(); ++i) {
      const Segment& segment = segments[i];
      uint8_t* in_pages = segment.base + copy.block_id * segment.stride;
      if (to_arena && i + kPrefetchSegments < segments.size()) {
        const Segment& later = segments[i + kPrefetchSegments];
        Prefetch(later.base + copy.block_id * later.stride, later.num_bytes);
      }
      CopyBytes(to_arena ? in_arena : in_pages, to_arena ? in_pages : in_arena, segment.num_bytes,
                is_large);
      in_arena += segment.num_bytes;
    }
  }
  if (is_large) EndStreaming();
}

}  // namespace kvtier
