#include "receive.h"

#include <sys/socket.h>
#include <sys/time.h>

#include <algorithm>
#include <cerrno>
#include <chrono>

namespace kvtier {

namespace {

using Clock = std::chrono::steady_clock;

// Taken at once, and then hashed in the second-level cache. Whatever is there is taken, nothing waited
// for: what the sender puts into the socket meanwhile is the next piece.
constexpr size_t kPieceBytes = size_t{1} << 19;
// Small buffers that are filled together. (Header, payload and what closes a message are three.)
constexpr size_t kPieceBuffers = 4;
constexpr int64_t kLeastTimeoutUs = 1000;
constexpr int64_t kSecondUs = 1000000;

// How much is there, and what is to come next.
class Position {
 public:
  explicit Position(const std::vector<iovec>& buffers) noexcept : buffers_(buffers) { SkipEmpty(); }

  bool is_end() const noexcept { return index_ == buffers_.size(); }

  // The bytes of a buffer that are there.
  size_t NumThere(size_t index) const noexcept {
    if (index == index_) return offset_;
    return index < index_ ? buffers_[index].iov_len : 0;
  }

  // The next piece of one buffer, or of small ones together.
  size_t Fill(iovec* piece, size_t most) const noexcept {
    size_t count = 0, num_bytes = 0, offset = offset_;
    for (size_t i = index_; i < buffers_.size() && count < most && num_bytes < kPieceBytes; ++i) {
      const size_t length = std::min(buffers_[i].iov_len - offset, kPieceBytes - num_bytes);
      piece[count++] = {static_cast<uint8_t*>(buffers_[i].iov_base) + offset, length};
      num_bytes += length;
      offset = 0;
    }
    return count;
  }

  void Advance(size_t num_bytes) noexcept {
    while (num_bytes > 0) {
      const size_t step = std::min(num_bytes, buffers_[index_].iov_len - offset_);
      offset_ += step;
      num_bytes -= step;
      SkipEmpty();
    }
  }

 private:
  void SkipEmpty() noexcept {
    while (index_ < buffers_.size() && offset_ == buffers_[index_].iov_len) {
      ++index_;
      offset_ = 0;
    }
  }

  const std::vector<iovec>& buffers_;
  size_t index_ = 0, offset_ = 0;
};

int SetTimeout(int fd, int64_t timeout_us) noexcept {
  const timeval value = {static_cast<time_t>(timeout_us / kSecondUs),
                         static_cast<suseconds_t>(timeout_us % kSecondUs)};
  return setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &value, sizeof(value)) == 0 ? 0 : errno;
}

}  // namespace

int Receive(int fd, const std::vector<iovec>& buffers, size_t hashed, Limits limits,
            TakeStripes take, uint8_t digest[kChecksumBytes]) {
  const Clock::time_point end = Clock::now() + std::chrono::microseconds(limits.total_us);
  Checksum checksum(take, static_cast<const uint8_t*>(buffers[hashed].iov_base),
                    buffers[hashed].iov_len);
  Position position(buffers);
  int64_t set_us = -1;  // the time-out that the socket has by now
  while (!position.is_end()) {
    const int64_t left_us =
        std::chrono::duration_cast<std::chrono::microseconds>(end - Clock::now()).count();
    if (left_us <= 0) return ETIMEDOUT;
    const int64_t timeout_us = std::max(std::min(limits.stall_us, left_us), kLeastTimeoutUs);
    if (timeout_us != set_us) {
      const int error = SetTimeout(fd, timeout_us);
      if (error != 0) return error;
      set_us = timeout_us;
    }
    iovec piece[kPieceBuffers];
    msghdr message = {};
    message.msg_iov = piece;
    message.msg_iovlen = position.Fill(piece, kPieceBuffers);
    const ssize_t count = recvmsg(fd, &message, 0);
    if (count == 0) return kClosed;
    if (count < 0) {
      if (errno == EINTR) continue;
      return errno == EAGAIN && left_us <= limits.stall_us ? ETIMEDOUT : errno;
    }
    position.Advance(static_cast<size_t>(count));
    checksum.Advance(position.NumThere(hashed));
  }
  checksum.Finish(digest);
  return kReceived;
}

}  // namespace kvtier
