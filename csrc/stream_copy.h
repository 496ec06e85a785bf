// Copies of scattered pieces past the caches, for batches too large to stay in them until somebody
// reads them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvtier {

// One run of bytes and where it goes.
struct Piece {
  uint8_t* target;
  const uint8_t* source;
  size_t num_bytes;
};

// How many pieces are copied side by side.
constexpr size_t kLanes = 8;

// Copies `num_pieces` <= kLanes pieces that do not overlap. Changes the array.
using CopyPieces = void (*)(Piece* pieces, size_t num_pieces) noexcept;

// By memcpy, one piece after the other.
void CopyPlainly(Piece* pieces, size_t num_pieces) noexcept;

// With non-temporal stores, or CopyPlainly where this CPU has none that pay.
CopyPieces BestStreamCopy() noexcept;

// Orders non-temporal stores before everything that follows. Once per thread and batch.
void EndStreaming() noexcept;

}  // namespace kvtier
