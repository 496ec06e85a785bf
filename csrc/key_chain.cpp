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

  // Ends the message. Returns the block that is left to compress.
  const uint8_t* Pad() noexcept {
    buffer_[used_++] = 0x80;
    if (used_ > kShaBlockBytes - 8) {
      std::memset(buffer_ + used_, 0, kShaBlockBytes - used_);
      Flush();
    }
    std::memset(buffer_ + used_, 0, kShaBlockBytes - 8 - used_);
    const uint64_t num_bits = __builtin_bswap64(uint64_t{total_bytes_} * 8);
    std::memcpy(buffer_ + kShaBlockBytes - 8, &num_bits, 8);
    return buffer_;
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

// The same for messages that all end alike but for what is put in: no extra bytes, and all in one
// block. Padding each anew takes a twentieth of the time that short blocks take.
class FixedTail {
 public:
  // `rest_bytes`: how many bytes of tokens follow the whole blocks.
  FixedTail(size_t hashed_bytes, size_t rest_bytes) noexcept : rest_bytes_(rest_bytes) {
    if (!Fits(rest_bytes)) return;
    buffer_[rest_bytes + kKeyBytes] = 0x80;
    const uint64_t num_bits = __builtin_bswap64((hashed_bytes + rest_bytes + kKeyBytes) * 8);
    std::memcpy(buffer_ + kShaBlockBytes - 8, &num_bits, 8);
  }

  static bool Fits(size_t rest_bytes) noexcept {
    return rest_bytes + kKeyBytes + 1 + 8 <= kShaBlockBytes;
  }

  const uint8_t* Fill(const uint8_t* rest, const uint8_t* parent) noexcept {
    if (rest_bytes_ > 0) std::memcpy(buffer_, rest, rest_bytes_);
    std::memcpy(buffer_ + rest_bytes_, parent, kKeyBytes);
    return buffer_;
  }

 private:
  size_t rest_bytes_;
  uint8_t buffer_[kShaBlockBytes] = {};
};

void StoreKey(const uint32_t* state, uint8_t* key) noexcept {
  for (size_t word = 0; word < kKeyBytes / 4; ++word) {
    const uint32_t big_endian = __builtin_bswap32(state[word]);
    std::memcpy(key + 4 * word, &big_endian, 4);
  }
}

}  // namespace

// Two compressions at a time take as long as one. Only the last one of a message waits for the key
// before it; it goes together with the first one of the message after next. The others of two
// messages go together.
void ChainKeys(const Sha256& sha, uint8_t parent[kKeyBytes], const uint32_t* tokens,
               size_t num_blocks, size_t block_tokens, ExtraBytes extras, KeySink sink) {
  const size_t token_bytes = block_tokens * sizeof(uint32_t);
  const size_t num_whole = token_bytes / kShaBlockBytes, whole_bytes = num_whole * kShaBlockBytes;
  const size_t rest_bytes = token_bytes - whole_bytes;
  const bool is_fixed = extras.offsets == nullptr && FixedTail::Fits(rest_bytes);
  FixedTail fixed_tail(whole_bytes, rest_bytes);
  const uint8_t* const data = reinterpret_cast<const uint8_t*>(tokens);
  uint32_t states[4][kShaStateWords];  // of a message and the three after it
  for (size_t block = 0; block < 2 && block < num_blocks; ++block) {
    std::memcpy(states[block], kShaInitialState, sizeof(states[block]));
    if (num_whole > 0) sha.compress(states[block], data + block * token_bytes, 1);
  }
  for (size_t block = 0; block < num_blocks; ++block) {
    uint32_t* const state = states[block % 4];
    const uint8_t* const message = data + block * token_bytes;
    if (block % 2 == 0 && num_whole > 1) {
      const uint8_t* const rest = message + kShaBlockBytes;
      if (block + 1 < num_blocks) {
        sha.compress_two(state, rest, states[(block + 1) % 4], rest + token_bytes, num_whole - 1);
      } else {
        sha.compress(state, rest, num_whole - 1);
      }
    }
    Tail tail(sha, state, whole_bytes);
    const uint8_t* last_block;
    if (is_fixed) {
      last_block = fixed_tail.Fill(message + whole_bytes, parent);
    } else {
      tail.Append(message + whole_bytes, rest_bytes);
      if (extras.offsets != nullptr) {
        tail.Append(extras.data + extras.offsets[block],
                    extras.offsets[block + 1] - extras.offsets[block]);
      }
      tail.Append(parent, kKeyBytes);
      last_block = tail.Pad();
    }
    uint32_t* const later_state = states[(block + 2) % 4];
    std::memcpy(later_state, kShaInitialState, sizeof(states[0]));
    if (block + 2 < num_blocks && num_whole > 0) {
      sha.compress_two(state, last_block, later_state, message + 2 * token_bytes, 1);
    } else {
      sha.compress(state, last_block, 1);
    }
    StoreKey(state, parent);
    sink.take(sink.context, parent);
  }
}

}  // namespace kvtier
