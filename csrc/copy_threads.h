// A few threads that help with long copies: made when first needed, then kept.
#pragma once

#include <cstddef>

namespace kvtier {

constexpr size_t kMaxCopyThreads = 16;

// Calls task(context, i) for every i below `num_tasks`, on this thread and on up to `num_threads` - 1
// others, at most one per CPU that this thread may run on. Returns when all have returned.
//
// This thread takes every task that no other has begun, so it never waits for a thread that got no
// CPU. While another caller uses the threads, it does everything itself. Safe after fork; nothing
// waits for the threads when the process ends.
void RunTasks(size_t num_tasks, size_t num_threads, void (*task)(void* context, size_t index),
              void* context) noexcept;

}  // namespace kvtier
