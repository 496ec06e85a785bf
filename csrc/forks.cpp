#include "forks.h"

#include <pthread.h>

namespace kvtier {

namespace {

unsigned num_forks = 0;  // written by the only thread of a new process

}  // namespace

unsigned NumForks() noexcept {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { ++num_forks; });
  static_cast<void>(registered);
  return num_forks;
}

}  // namespace kvtier
