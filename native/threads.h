// The engine's own thread pool: one fork and one join an operation, spinning a little before it sleeps.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace hasten {

class ThreadPool {
 public:
  ~ThreadPool();

  // Calls fn(thread) for thread = 0 .. threads-1, 0 on the caller, and returns when all are done. Calls from several
  // threads take turns; fn must not call run() itself.
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

 private:
  using Task = void (*)(void*, int);
  struct Worker {
    std::thread thread;
    alignas(64) std::atomic<uint32_t> ticket{0};  // raised to hand over work
  };

  void run_erased(int threads, Task task, void* context);
  void grow(int workers);

  std::mutex mutex_;
  std::vector<std::unique_ptr<Worker>> workers_;
  Task task_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<int> pending_{0};
  std::atomic<bool> stop_{false};
};

// The one pool of the process.
ThreadPool& pool();

// Cores this process may run on.
int usable_cores();

}  // namespace hasten
