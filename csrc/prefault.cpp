#include "prefault.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>

namespace kvtier {

namespace {

#if !defined(MADV_POPULATE_WRITE)
constexpr int MADV_POPULATE_WRITE = 23;  // Linux 5.14; older headers do not know it
#endif

}  // namespace

int Prefault(uintptr_t address, size_t num_bytes) noexcept {
  if (num_bytes == 0) return 0;
  const uintptr_t page_bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = address & ~(page_bytes - 1), end = address + num_bytes;
  void* const start = reinterpret_cast<void*>(first);
  int result;
  do {
    result = madvise(start, end - first, MADV_POPULATE_WRITE);
  } while (result != 0 && (errno == EINTR || errno == EAGAIN));
  if (result == 0) return 0;
  const int error = errno;
  const bool is_old_kernel = error == EINVAL && madvise(start, 0, MADV_POPULATE_WRITE) != 0;
  if (!is_old_kernel) return error;
  // Or-ing zero is one indivisible write, so it undoes nobody's.
  for (uintptr_t page = first; page < end; page += page_bytes) {
    const uintptr_t byte = page < address ? address : page;
    __atomic_fetch_or(reinterpret_cast<uint8_t*>(byte), uint8_t{0}, __ATOMIC_RELAXED);
  }
  return 0;
}

}  // namespace kvtier
