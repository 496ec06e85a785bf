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

// The words that follow the key before in the last block of a message of `hashed_bytes` and that key.
struct Padding {
  explicit Padding(uint64_t hashed_bytes) noexcept {
    const uint64_t num_bits = (hashed_bytes + kKeyBytes) * 8;
    words[0] = 0x80000000;
    words[kShaPaddingWords - 2] = static_cast<uint32_t>(num_bits >> 32);
    words[kShaPaddingWords - 1] = static_cast<uint32_t>(num_bits);
  }

  uint32_t words[kShaPaddingWords] = {};
};

static_assert(kKeyBytes == 4 * kShaLinkWords, "a key is a link of the chain");

// A key is the digest's first words, each with its highest byte first; also the way back.
void SwapKey(void* target, const void* source) noexcept {
  uint32_t words[kShaLinkWords];
  std::memcpy(words, source, kKeyBytes);
  for (uint32_t& word : words) word = __builtin_bswap32(word);
  std::memcpy(target, words, kKeyBytes);
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
  const bool is_linked = extras.offsets == nullptr && rest_bytes == 0;
  const Padding padding(whole_bytes);
  const uint8_t* const data = reinterpret_cast<const uint8_t*>(tokens);
  uint32_t link[kShaLinkWords];
  SwapKey(link, parent);
  uint32_t states[4][kShaStateWords];  // of a message and the three after it
  for (size_t block = 0; block < 2 && block < num_blocks; ++block) {
    std::memcpy(states[block], kShaInitialState, sizeof(states[block]));
    if (num_whole > 0) sha.compress(states[block], data + block * token_bytes, 1);
  }
  for (size_t block = 0; block < num_blocks; ++block) {
    uint32_t* const state = states[block % 4];
    uint32_t* const later_state = states[(block + 2) % 4];
    const uint8_t* const message = data + block * token_bytes;
    const bool has_later = block + 2 < num_blocks && num_whole > 0;
    const uint8_t* const later = has_later ? message + 2 * token_bytes : nullptr;
    if (block % 2 == 0 && num_whole > 1) {
      const uint8_t* const rest = message + kShaBlockBytes;
      if (block + 1 < num_blocks) {
        sha.compress_two(state, rest, states[(block + 1) % 4], rest + token_bytes, num_whole - 1);
      } else {
        sha.compress(state, rest, num_whole - 1);
      }
    }
    if (is_linked) {
      sha.compress_link(link, state, padding.words, later_state, later);
      SwapKey(parent, link);
    } else {
      Tail tail(sha, state, whole_bytes);
      tail.Append(message + whole_bytes, rest_bytes);
      if (extras.offsets != nullptr) {
        tail.Append(extras.data + extras.offsets[block],
                    extras.offsets[block + 1] - extras.offsets[block]);
      }
      tail.Append(parent, kKeyBytes);
      const uint8_t* const last_block = tail.Pad();
      std::memcpy(later_state, kShaInitialState, sizeof(states[0]));
      if (has_later) {
        sha.compress_two(state, last_block, later_state, later, 1);
      } else {
        sha.compress(state, last_block, 1);
      }
      SwapKey(parent, state);
    }
    sink.take(sink.context, parent);
  }
}

}  // namespace kvtier
