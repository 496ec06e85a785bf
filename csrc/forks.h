// Whether this process is the one that made something, or a fork of it.
#pragma once

namespace kvtier {

// Grows by one in each child of a fork. Registered when first asked: ask when the thing is made.
unsigned NumForks() noexcept;

}  // namespace kvtier
