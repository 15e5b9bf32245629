#include "threads.h"

#include <algorithm>

#ifdef __linux__
#include <pthread.h>
#endif

namespace hasten {
namespace {

// About 50 us: longer than the gaps inside a step. A worker that finds nothing for so long sleeps.
constexpr int kIdleSpins = 2000;
// A few microseconds: what the last piece of a worker that has its core takes. A later one has lost its core, and
// spinning would take time away from whoever could run there.
constexpr int kJoinSpins = 200;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

ThreadPool* instance = nullptr;

}  // namespace

ThreadPool& pool() {
  // Never destroyed: at exit, workers may still be asleep in the kernel, and joining them from a static destructor of a
  // module that Python is unloading can hang.
  static std::once_flag once;
  std::call_once(once, [] {
    instance = new ThreadPool;
#ifdef __linux__
    // The child of a fork has none of the workers, and perhaps a lock that nobody will give back: it starts anew.
    pthread_atfork(nullptr, nullptr, [] { instance = new ThreadPool; });
#endif
  });
  return *instance;
}

ThreadPool::~ThreadPool() {
  stop_ = true;
  for (auto& worker : workers_) {
    worker->ticket.fetch_add(1);
    worker->ticket.notify_one();
    worker->thread.join();
  }
}

// Runs the task until it ends or throws. The first exception is kept for the caller.
void ThreadPool::take_part(int number) {
  try {
    if (!failed_.load(std::memory_order_relaxed)) task_(context_, number);
  } catch (...) {
    if (!failed_.exchange(true)) error_ = std::current_exception();
  }
}

// Goes into the job if it is open and has room for this worker.
void ThreadPool::join_in(int number) {
  const bool open = (inside_.fetch_add(1, std::memory_order_acquire) & kClosed) == 0;
  if (open && number < threads_) take_part(number);
  if (inside_.fetch_sub(1, std::memory_order_release) == kClosed + 1) inside_.notify_one();
}

void ThreadPool::work(Worker& worker, int number) {
  uint32_t seen = 0;
  for (;;) {
    int spins = 0;
    while (worker.ticket.load(std::memory_order_acquire) == seen) {
      if (++spins < kIdleSpins)
        relax();
      else
        worker.ticket.wait(seen, std::memory_order_acquire);
    }
    seen = worker.ticket.load(std::memory_order_acquire);
    if (stop_) return;
    join_in(number);
  }
}

void ThreadPool::grow(int workers) {
  while (static_cast<int>(workers_.size()) < workers) {
    const int number = static_cast<int>(workers_.size()) + 1;
    workers_.push_back(std::make_unique<Worker>());
    Worker& worker = *workers_.back();
    try {
      worker.thread = std::thread([this, &worker, number] { work(worker, number); });
    } catch (...) {  // no more threads allowed: the ones there are do the work
      workers_.pop_back();
      return;
    }
  }
}

// Of so many threads, those that can be had: the caller and the workers.
int ThreadPool::available(int threads) {
  std::lock_guard lock(mutex_);
  grow(threads - 1);
  return std::min(threads, static_cast<int>(workers_.size()) + 1);
}

// Lets no more workers in and waits for those inside.
void ThreadPool::close() {
  inside_.fetch_or(kClosed, std::memory_order_acq_rel);
  int spins = 0;
  for (uint32_t now = inside_.load(std::memory_order_acquire); now != kClosed;
       now = inside_.load(std::memory_order_acquire)) {
    if (++spins < kJoinSpins)
      relax();
    else
      inside_.wait(now, std::memory_order_acquire);
  }
}

void ThreadPool::run_erased(int threads, Task task, void* context) {
  if (threads <= 1) {
    task(context, 0);
    return;
  }
  std::lock_guard lock(mutex_);
  grow(threads - 1);
  task_ = task;
  context_ = context;
  threads_ = threads;
  inside_.fetch_and(~kClosed, std::memory_order_release);
  for (int i = 0; i < std::min<int>(threads - 1, static_cast<int>(workers_.size())); i++) {
    workers_[i]->ticket.fetch_add(1, std::memory_order_release);
    workers_[i]->ticket.notify_one();
  }
  take_part(0);
  close();
  if (failed_) {
    failed_ = false;
    std::rethrow_exception(std::exchange(error_, nullptr));
  }
}

}  // namespace hasten
