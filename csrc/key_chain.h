// Block keys: a chain of truncated SHA-256 digests.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sha256.h"

namespace kvtier {

constexpr size_t kKeyBytes = 16;

// The extra bytes of all blocks, one after the other: those of block i are data[offsets[i] ..
// offsets[i + 1]). `offsets` may be null: no block has any.
struct ExtraBytes {
  const uint8_t* data = nullptr;
  const size_t* offsets = nullptr;
};

// Hears of each key as soon as it is there, in order. What it does then goes on beside the hashing of
// the next block, which waits for its own instructions. (Making all objects of the keys afterwards
// took a tenth of the time that short blocks take.)
struct KeySink {
  void (*take)(void* context, const uint8_t* key);
  void* context;
};

// key[i] = SHA-256(tokens of block i || extra bytes of block i || key[i - 1])[:16], with key[-1] =
// parent. `parent` is the last of them afterwards.
//
// The parent comes last, so that everything before it can be hashed for two blocks at a time.
void ChainKeys(const Sha256& sha, uint8_t parent[kKeyBytes], const uint32_t* tokens,
               size_t num_blocks, size_t block_tokens, ExtraBytes extras, KeySink sink);

}  // namespace kvtier
