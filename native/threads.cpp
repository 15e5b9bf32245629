#include "threads.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#ifdef __linux__
#include <pthread.h>
#endif

namespace hasten {
namespace {

// About 50 us: longer than the gaps inside a step. A worker that finds nothing for so long sleeps.
constexpr int kIdleSpins = 2000;
// Ten to forty microseconds: what the last piece of a worker that has its core takes. A later one has lost its core,
// and spinning would take time away from whoever could run there.
constexpr int kJoinSpins = 800;

enum : uint8_t { kOpen, kCommitting, kDone };  // a piece of a retake()

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// What this worker will probably read next, as the last job said.
thread_local ThreadPool::Range wanted;

// The next bytes of a range into the second level of cache.
inline void fetch_some(ThreadPool::Range& range) {
  constexpr size_t kLine = 64, kLines = 4;
  for (size_t i = 0; i < kLines; i++) __builtin_prefetch(range.data + i * kLine, 0, 2);
  const size_t step = std::min(range.bytes, kLines * kLine);
  range.data += step;
  range.bytes -= step;
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
void ThreadPool::Slot::take_part(int number) {
  try {
    if (!failed.load(std::memory_order_relaxed)) task(context, number);
  } catch (...) {
    if (!failed.exchange(true)) error = std::current_exception();
  }
}

// Between two products a core that waits would leave memory idle for a tenth of a decode step: it fetches what it will
// read next, until the ticket comes.
void ThreadPool::wait_for_ticket(Worker& worker, uint32_t seen) {
  for (int spins = 0; worker.ticket.load(std::memory_order_acquire) == seen;) {
    if (wanted.bytes > 0)
      fetch_some(wanted);
    else if (++spins < kIdleSpins)
      relax();
    else
      worker.ticket.wait(seen, std::memory_order_acquire);
  }
}

void ThreadPool::work(Worker& worker, int number) {
  uint32_t seen = 0;
  for (;;) {
    wait_for_ticket(worker, seen);
    seen = worker.ticket.load(std::memory_order_acquire);
    if (stop_) return;
    Slot& slot = *current_.load(std::memory_order_acquire);
    const bool open = (slot.inside.fetch_add(1, std::memory_order_acquire) & kClosed) == 0;
    if (open && number < slot.threads) slot.take_part(number);
    if (slot.inside.fetch_sub(1, std::memory_order_release) == kClosed + 1) slot.inside.notify_one();
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

namespace {

// Waits until nobody is inside a closed slot.
void wait_for_nobody(std::atomic<uint32_t>& inside, uint32_t closed) {
  int spins = 0;
  for (uint32_t now = inside.load(std::memory_order_acquire); now != closed;
       now = inside.load(std::memory_order_acquire)) {
    if (++spins < kJoinSpins)
      relax();
    else
      inside.wait(now, std::memory_order_acquire);
  }
}

}  // namespace

ThreadPool::Slot& ThreadPool::free_slot() {
  for (auto& slot : slots_)
    if (slot->inside.load(std::memory_order_acquire) == kClosed) return *slot;
  slots_.push_back(std::make_unique<Slot>());
  return *slots_.back();
}

// Lets workers in and tells them.
void ThreadPool::open(Slot& slot, int threads, Task task, void* context) {
  slot.task = task;
  slot.context = context;
  slot.threads = threads;
  slot.failed = false;  // a late worker of the job before may have failed
  slot.error = nullptr;
  slot.inside.fetch_and(~kClosed, std::memory_order_release);
  current_.store(&slot, std::memory_order_release);
  for (int i = 0; i < std::min<int>(threads - 1, static_cast<int>(workers_.size())); i++) {
    workers_[i]->ticket.fetch_add(1, std::memory_order_release);
    workers_[i]->ticket.notify_one();
  }
}

void ThreadPool::run_erased(int threads, Task task, void* context) {
  if (threads <= 1) {
    task(context, 0);
    return;
  }
  std::lock_guard lock(mutex_);
  grow(threads - 1);
  Slot& slot = free_slot();
  open(slot, threads, task, context);
  slot.take_part(0);
  slot.inside.fetch_or(kClosed, std::memory_order_acq_rel);
  wait_for_nobody(slot.inside, kClosed);
  if (slot.failed) std::rethrow_exception(std::exchange(slot.error, nullptr));
}

// Computes a piece that is open and commits it, unless somebody else did in the meantime.
bool ThreadPool::Slot::finish(int piece) {
  static thread_local Scratch scratch;
  compute(job, piece, scratch);
  uint8_t open = kOpen;
  if (!state[piece].compare_exchange_strong(open, kCommitting, std::memory_order_acq_rel)) return false;
  commit(job, piece, scratch);
  state[piece].store(kDone, std::memory_order_release);
  if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == pieces) done.notify_one();
  return true;
}

// The next piece of this thread's share, else the last of another's; -1 where all have begun.
int ThreadPool::Slot::take_piece(int number) {
  for (int i = 0; i < shares; i++) {
    std::atomic<uint64_t>& left = share[(number + i) % shares].left;
    uint64_t now = left.load(std::memory_order_relaxed);
    for (;;) {
      const uint32_t begin = static_cast<uint32_t>(now), end = static_cast<uint32_t>(now >> 32);
      if (begin >= end) break;
      const uint64_t after = i == 0 ? now + 1 : now - (uint64_t{1} << 32);
      if (left.compare_exchange_weak(now, after, std::memory_order_relaxed))
        return static_cast<int>(i == 0 ? begin : end - 1);
    }
  }
  return -1;
}

void ThreadPool::Slot::take_pieces(int number) {
  for (int piece = take_piece(number); piece >= 0; piece = take_piece(number)) finish(piece);
  wanted = ahead(job, number, shares);
}

void ThreadPool::retake_erased(int threads, int pieces, const void* job, size_t bytes, Compute compute, Commit commit,
                               Ahead ahead) {
  using Clock = std::chrono::steady_clock;
  if (pieces <= 0) return;
  std::lock_guard lock(mutex_);
  if (threads > 1) grow(threads - 1);
  Slot& slot = free_slot();
  std::memcpy(slot.job, job, bytes);
  slot.compute = compute;
  slot.commit = commit;
  slot.ahead = ahead;
  slot.pieces = pieces;
  slot.done = 0;
  slot.shares = std::clamp(threads, 1, kMostShares);
  for (int i = 0; i < slot.shares; i++)
    slot.share[i].left.store(
        static_cast<uint64_t>(pieces) * (i + 1) / slot.shares << 32 | static_cast<uint64_t>(pieces) * i / slot.shares,
        std::memory_order_relaxed);
  for (int i = 0; i < pieces; i++) slot.state[i].store(kOpen, std::memory_order_relaxed);
  const auto start = Clock::now();
  open(slot, threads, [](void* s, int number) { static_cast<Slot*>(s)->take_pieces(number); }, &slot);
  slot.take_part(0);
  // What is missing now is in workers' hands. With their cores they need about a piece's time; then it is taken over.
  const auto taken = Clock::now();
  const auto patience = std::chrono::microseconds(5) + 2 * threads * (taken - start) / pieces;
  while (slot.done.load(std::memory_order_acquire) != pieces && !slot.failed && Clock::now() - taken < patience)
    relax();
  slot.inside.fetch_or(kClosed, std::memory_order_acq_rel);  // before what may throw: the slot is used again
  for (int piece = 0; piece < pieces && slot.done.load(std::memory_order_acquire) != pieces; piece++)
    if (slot.state[piece].load(std::memory_order_acquire) == kOpen) slot.finish(piece);
  for (int seen = slot.done; seen != pieces; seen = slot.done) slot.done.wait(seen, std::memory_order_acquire);
}

void ThreadPool::quiesce() {
  std::lock_guard lock(mutex_);
  for (auto& slot : slots_) wait_for_nobody(slot->inside, kClosed);
}

}  // namespace hasten
