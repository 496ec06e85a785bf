// SHA-256's compression function, one and two messages at a time, and chains of messages.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvtier {

constexpr size_t kShaBlockBytes = 64;
constexpr size_t kShaStateWords = 8;
constexpr size_t kShaLinkWords = 4;
constexpr size_t kShaPaddingWords = kShaBlockBytes / 4 - kShaLinkWords;

extern const uint32_t kShaInitialState[kShaStateWords];

// One implementation of the compression function. All produce the same states.
struct Sha256 {
  const char* name;
  // Feeds `num_blocks` blocks of 64 bytes into one state.
  void (*compress)(uint32_t* state, const uint8_t* data, size_t num_blocks) noexcept;
  // The same for two independent messages at once, each of `num_blocks` blocks. The rounds of one
  // message wait for each other; those of two fill the gaps.
  void (*compress_two)(uint32_t* state_a, const uint8_t* data_a, uint32_t* state_b,
                       const uint8_t* data_b, size_t num_blocks) noexcept;
  // One link of a chain: the digest of a message whose last block is `link` and then `padding`, and
  // of which `state` holds what is before. `link` is the first words of that digest afterwards. It
  // stays words all the way, as the next link waits for it: bytes in between would take a third
  // longer. At the same time `later_state` takes the first 64 bytes of another message, `later`,
  // unless that is null.
  void (*compress_link)(uint32_t* link, const uint32_t* state, const uint32_t* padding,
                        uint32_t* later_state, const uint8_t* later) noexcept;
};

// The fastest implementation on this CPU.
const Sha256& BestSha256() noexcept;
// The one in plain C++, for every CPU.
const Sha256& PortableSha256() noexcept;

}  // namespace kvtier
