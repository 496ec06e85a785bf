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

// keys[i] = SHA-256(tokens of block i || extra bytes of block i || keys[i - 1])[:16], with keys[-1]
// = parent.
//
// The parent comes last, so that everything before it can be hashed for two blocks at a time.
void ChainKeys(const Sha256& sha, const uint8_t* parent, const uint32_t* tokens, size_t num_blocks,
               size_t block_tokens, ExtraBytes extras, uint8_t* keys) noexcept;

}  // namespace kvtier
