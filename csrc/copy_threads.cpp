#include "copy_threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>

namespace kvtier {

namespace {

constexpr size_t kStackBytes = size_t{256} << 10;

struct Job {
  void (*task)(void*, size_t) = nullptr;
  void* context = nullptr;
  size_t num_tasks = 0;
  std::atomic<size_t> next{0};

  void Work() noexcept {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) task(context, i);
  }
};

// Nothing here has a destructor that runs: threads may wait on it while the process ends.
struct Threads {
  pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t has_work = PTHREAD_COND_INITIALIZER;
  pthread_cond_t is_done = PTHREAD_COND_INITIALIZER;
  size_t num_threads = 0;
  size_t num_wanted = 0;   // threads that may still join the job
  size_t num_working = 0;  // threads that have joined it
  bool is_taken = false;   // by a caller
  bool handles_fork = false;
  Job* job = nullptr;
};

Threads threads;

// The child of a fork has none of the threads, and whatever they held is held by nobody.
void ForgetThreads() noexcept {
  threads.mutex = PTHREAD_MUTEX_INITIALIZER;
  threads.has_work = PTHREAD_COND_INITIALIZER;
  threads.is_done = PTHREAD_COND_INITIALIZER;
  threads.num_threads = threads.num_wanted = threads.num_working = 0;
  threads.is_taken = false;
  threads.job = nullptr;
}

void* Help(void*) noexcept {
  pthread_mutex_lock(&threads.mutex);
  for (;;) {
    while (threads.num_wanted == 0) pthread_cond_wait(&threads.has_work, &threads.mutex);
    --threads.num_wanted;
    ++threads.num_working;
    Job* job = threads.job;
    pthread_mutex_unlock(&threads.mutex);
    job->Work();
    pthread_mutex_lock(&threads.mutex);
    if (--threads.num_working == 0) pthread_cond_signal(&threads.is_done);
  }
  return nullptr;
}

// Called with the mutex held.
bool StartThread() noexcept {
  if (!threads.handles_fork) {
    if (pthread_atfork(nullptr, nullptr, ForgetThreads) != 0) return false;
    threads.handles_fork = true;
  }
  pthread_attr_t attributes;
  if (pthread_attr_init(&attributes) != 0) return false;
  pthread_attr_setstacksize(&attributes, kStackBytes);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  sigset_t all, before;  // signals are for the threads of the program
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  pthread_t thread;
  const bool has_started = pthread_create(&thread, &attributes, Help, nullptr) == 0;
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_attr_destroy(&attributes);
  if (has_started) {
#if defined(__GLIBC__)
    pthread_setname_np(thread, "kvtier-copy");
#endif
    ++threads.num_threads;
  }
  return has_started;
}

size_t NumUsableCpus() noexcept {
  cpu_set_t usable;
  if (sched_getaffinity(0, sizeof(usable), &usable) != 0) return 1;  // more CPUs than fit: rare
  return static_cast<size_t>(std::max(1, CPU_COUNT(&usable)));
}

// Offers a job to `num_helpers` threads. False where another caller has them.
bool Offer(Job* job, size_t num_helpers) noexcept {
  pthread_mutex_lock(&threads.mutex);
  const bool is_mine = !threads.is_taken;
  if (is_mine) {
    while (threads.num_threads < num_helpers && StartThread()) {
    }
    threads.is_taken = true;
    threads.job = job;
    threads.num_wanted = std::min(num_helpers, threads.num_threads);
    pthread_cond_broadcast(&threads.has_work);
  }
  pthread_mutex_unlock(&threads.mutex);
  return is_mine;
}

// Takes the offer back and waits for the threads that have accepted it.
void Withdraw() noexcept {
  pthread_mutex_lock(&threads.mutex);
  threads.num_wanted = 0;
  while (threads.num_working > 0) pthread_cond_wait(&threads.is_done, &threads.mutex);
  threads.job = nullptr;
  threads.is_taken = false;
  pthread_mutex_unlock(&threads.mutex);
}

}  // namespace

void RunTasks(size_t num_tasks, size_t num_threads, void (*task)(void*, size_t),
              void* context) noexcept {
  Job job;
  job.task = task;
  job.context = context;
  job.num_tasks = num_tasks;
  num_threads = std::min({num_threads, num_tasks, kMaxCopyThreads});
  if (num_threads > 1) num_threads = std::min(num_threads, NumUsableCpus());
  const bool has_help = num_threads > 1 && Offer(&job, num_threads - 1);
  job.Work();
  if (has_help) Withdraw();
}

}  // namespace kvtier
