// Makes the kernel back a mapping with memory before somebody waits for it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvtier {

// Populates every page that overlaps [address, address + num_bytes), writable, and changes no byte.
// 0 or an errno.
int Prefault(uintptr_t address, size_t num_bytes) noexcept;

}  // namespace kvtier
