// The engine's own thread pool: one fork and one join an operation, spinning a little before it sleeps.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace hasten {

// Workers help: a job never needs them. The caller takes pieces of the job like every worker does, and when no piece is
// left it waits only for workers that are inside the job. A worker whose core another process holds comes too late,
// finds the job closed and goes back to sleep: it costs the others nothing. Workers are not pinned to cores, so that
// the system can move them away from a busy core, and two processes never insist on the same one.
//
// An exception that a piece throws ends the job early and is thrown again by the caller's run() or split().
class ThreadPool {
 public:
  ~ThreadPool();

  // Calls fn(thread) on the caller (thread 0) and on up to threads - 1 workers, each with its own number, and returns
  // when all that began have ended. Workers that come late are not waited for: fn takes its work from something shared.
  // Calls from several threads take turns; fn must not call run() or split() itself.
  template <typename Fn>
  void run(int threads, Fn&& fn) {
    using Plain = std::remove_reference_t<Fn>;
    run_erased(
        threads, [](void* context, int thread) { (*static_cast<Plain*>(context))(thread); },
        const_cast<void*>(static_cast<const void*>(&fn)));
  }

  // Splits [0, count) into contiguous pieces of at least `grain`, handed out as threads become free, and calls
  // fn(begin, end, thread). Free threads take the next piece, so that a core that others use too does not hold up the
  // rest.
  template <typename Fn>
  void split(int threads, int count, int grain, Fn&& fn, int pieces_per_thread = 8) {
    if (count <= 0) return;
    const int most = (count + grain - 1) / grain;
    if (threads > most) threads = most;
    if (threads <= 1) {
      fn(0, count, 0);
      return;
    }
    const int wanted = (count + threads * pieces_per_thread - 1) / (threads * pieces_per_thread);
    const int piece = (wanted + grain - 1) / grain * grain;
    std::atomic<int> next{0};
    run(threads, [&](int thread) {
      for (int begin = next.fetch_add(piece); begin < count; begin = next.fetch_add(piece))
        fn(begin, begin + piece < count ? begin + piece : count, thread);
    });
  }

  // Calls fn on `threads` threads at once and returns how many there were (fewer only where the system refuses to start
  // threads). Waits for workers that come late: for what measures them all.
  template <typename Fn>
  int everyone(int threads, Fn&& fn) {
    const int all = available(threads);
    std::atomic<int> there{0};
    run(all, [&](int) {
      for (there.fetch_add(1); there.load(std::memory_order_relaxed) < all;) std::this_thread::yield();
      fn();
    });
    return all;
  }

 private:
  using Task = void (*)(void*, int);
  struct Worker {
    std::thread thread;
    alignas(64) std::atomic<uint32_t> ticket{0};  // raised to announce a job
  };
  static constexpr uint32_t kClosed = 1u << 31;

  void run_erased(int threads, Task task, void* context);
  int available(int threads);
  void grow(int workers);
  void work(Worker& worker, int number);
  void join_in(int number);
  void take_part(int number);
  void close();

  std::mutex mutex_;
  std::vector<std::unique_ptr<Worker>> workers_;
  // The job. Written by the caller while it is closed and nobody is inside.
  Task task_ = nullptr;
  void* context_ = nullptr;
  int threads_ = 0;
  std::exception_ptr error_;
  std::atomic<bool> failed_{false};
  alignas(64) std::atomic<uint32_t> inside_{kClosed};  // workers inside the job, and whether more may come in
  std::atomic<bool> stop_{false};
};

// The one pool of the process.
ThreadPool& pool();

}  // namespace hasten
