#include "threads.h"

#include <algorithm>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#include <unistd.h>
#endif

namespace hasten {
namespace {

// About 100 us: longer than the gaps inside a step, shorter than anyone would notice on an idle machine.
constexpr int kSpins = 4000;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::vector<int> allowed_cores() {
  std::vector<int> cores;
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int core = 0; core < CPU_SETSIZE; core++)
      if (CPU_ISSET(core, &set)) cores.push_back(core);
#endif
  if (cores.empty()) cores.resize(std::max(1u, std::thread::hardware_concurrency()));
  return cores;
}

// Workers stay on one core each; the caller's thread belongs to the caller and is left alone.
void pin(std::thread& thread, int index) {
#ifdef __linux__
  static const std::vector<int> cores = allowed_cores();
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cores[index % cores.size()], &set);
  pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);  // best effort: a refusal only costs speed
#else
  (void)thread, (void)index;
#endif
}

}  // namespace

int usable_cores() { return static_cast<int>(allowed_cores().size()); }

ThreadPool& pool() {
  // Never destroyed: at exit, workers may still be asleep in the kernel, and joining them from a static destructor of a
  // module that Python is unloading can hang.
  static ThreadPool* instance = new ThreadPool;
#ifdef __linux__
  static pid_t owner = getpid();
  if (owner != getpid()) {  // after fork() the workers are gone: start anew
    owner = getpid();
    instance = new ThreadPool;
  }
#endif
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

void ThreadPool::grow(int workers) {
  while (static_cast<int>(workers_.size()) < workers) {
    const int index = static_cast<int>(workers_.size());
    workers_.push_back(std::make_unique<Worker>());
    workers_[index]->thread = std::thread([this, worker = workers_[index].get(), index] {
      uint32_t seen = 0;
      for (;;) {
        int spins = 0;
        while (worker->ticket.load(std::memory_order_acquire) == seen) {
          if (++spins < kSpins)
            relax();
          else
            worker->ticket.wait(seen, std::memory_order_acquire);
        }
        seen++;
        if (stop_) return;
        task_(context_, index + 1);
        if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) pending_.notify_one();
      }
    });
    pin(workers_[index]->thread, index + 1);
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
  pending_.store(threads - 1, std::memory_order_relaxed);
  for (int i = 0; i < threads - 1; i++) {
    workers_[i]->ticket.fetch_add(1, std::memory_order_release);
    workers_[i]->ticket.notify_one();
  }
  task(context, 0);
  int spins = 0;
  for (int left = pending_.load(std::memory_order_acquire); left != 0;
       left = pending_.load(std::memory_order_acquire)) {
    if (++spins < kSpins)
      relax();
    else
      pending_.wait(left, std::memory_order_acquire);
  }
}

}  // namespace hasten
