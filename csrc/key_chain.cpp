#include "key_chain.h"

#include <algorithm>
#include <cstring>

namespace kvtier {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "token ids are hashed as little-endian words");

namespace {

// The end of one message: what follows the whole 64-byte blocks that are in the state already.
class Tail {
 public:
  Tail(const Sha256& sha, uint32_t* state, size_t hashed_bytes) noexcept
      : sha_(sha), state_(state), total_bytes_(hashed_bytes) {}

  void Append(const uint8_t* data, size_t num_bytes) noexcept {
    total_bytes_ += num_bytes;
    while (num_bytes > 0) {
      const size_t piece = std::min(num_bytes, kShaBlockBytes - used_);
      std::memcpy(buffer_ + used_, data, piece);
      used_ += piece, data += piece, num_bytes -= piece;
      if (used_ == kShaBlockBytes) Flush();
    }
  }

  void Finish(uint8_t* key) noexcept {
    buffer_[used_++] = 0x80;
    if (used_ > kShaBlockBytes - 8) {
      std::memset(buffer_ + used_, 0, kShaBlockBytes - used_);
      Flush();
    }
    std::memset(buffer_ + used_, 0, kShaBlockBytes - 8 - used_);
    const uint64_t num_bits = __builtin_bswap64(uint64_t{total_bytes_} * 8);
    std::memcpy(buffer_ + kShaBlockBytes - 8, &num_bits, 8);
    Flush();
    for (size_t word = 0; word < kKeyBytes / 4; ++word) {
      const uint32_t big_endian = __builtin_bswap32(state_[word]);
      std::memcpy(key + 4 * word, &big_endian, 4);
    }
  }

 private:
  void Flush() noexcept {
    sha_.compress(state_, buffer_, 1);
    used_ = 0;
  }

  const Sha256& sha_;
  uint32_t* state_;
  uint64_t total_bytes_;
  size_t used_ = 0;
  uint8_t buffer_[kShaBlockBytes];
};

}  // namespace

void ChainKeys(const Sha256& sha, const uint8_t* parent, const uint32_t* tokens, size_t num_blocks,
               size_t block_tokens, ExtraBytes extras, uint8_t* keys) noexcept {
  const size_t token_bytes = block_tokens * sizeof(uint32_t);
  const size_t num_whole = token_bytes / kShaBlockBytes, whole_bytes = num_whole * kShaBlockBytes;
  const uint8_t* data = reinterpret_cast<const uint8_t*>(tokens);
  uint32_t states[2][kShaStateWords];
  for (size_t block = 0; block < num_blocks; ++block, data += token_bytes) {
    uint32_t* state = states[block % 2];
    if (block % 2 == 0) {
      std::memcpy(states[0], kShaInitialState, sizeof(states[0]));
      std::memcpy(states[1], kShaInitialState, sizeof(states[1]));
      if (block + 1 < num_blocks) {
        sha.compress_two(states[0], data, states[1], data + token_bytes, num_whole);
      } else {
        sha.compress(states[0], data, num_whole);
      }
    }
    Tail tail(sha, state, whole_bytes);
    tail.Append(data + whole_bytes, token_bytes - whole_bytes);
    if (extras.offsets != nullptr) {
      tail.Append(extras.data + extras.offsets[block],
                  extras.offsets[block + 1] - extras.offsets[block]);
    }
    tail.Append(parent, kKeyBytes);
    tail.Finish(keys + block * kKeyBytes);
    parent = keys + block * kKeyBytes;
  }
}

}  // namespace kvtier
