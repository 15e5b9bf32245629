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
// A worker may also lose its core in the middle of a piece, for milliseconds, where a whole step takes ten. Work whose
// pieces may be computed twice goes through retake(): the caller then computes the missing piece itself and goes on,
// and what the late worker brings is thrown away.
//
// An exception that a piece throws ends the job early and is thrown again by the caller's run() or split().
class ThreadPool {
 public:
  using Scratch = std::vector<float>;
  struct Range {
    const uint8_t* data = nullptr;
    size_t bytes = 0;
  };
  static constexpr int kMostPieces = 256;
  static constexpr int kMostShares = 64;

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

  // Computes pieces 0 .. pieces-1, each at least once, and commits each exactly once.
  //   job.compute(piece, scratch)   writes nothing but `scratch`; std::bad_alloc is all it may throw
  //   job.commit(piece, scratch)    puts the result in its place; short
  //   job.ahead(thread, threads)    may be left out: what that thread will probably read next; a worker that waits
  //                                 fetches it
  // All are const. The job is copied and may outlive the call inside a late worker, which goes on reading what the job
  // points to: before any of that memory is freed or moved, call quiesce().
  //
  // Each thread has a share of pieces that lie side by side, and takes them in order; who is done takes the last piece
  // of another's share. Pieces dealt out in turn would cost bandwidth: the processor fetches on behind each of them
  // what the other core reads.
  template <typename Job>
  void retake(int threads, int pieces, const Job& job) {
    static_assert(std::is_trivially_copyable_v<Job> && sizeof(Job) <= kJobBytes);
    retake_erased(
        threads, pieces, &job, sizeof(Job),
        [](const void* j, int piece, Scratch& scratch) { static_cast<const Job*>(j)->compute(piece, scratch); },
        [](const void* j, int piece, const Scratch& scratch) { static_cast<const Job*>(j)->commit(piece, scratch); },
        [](const void* j, int thread, int all) -> Range {
          if constexpr (requires(const Job& some) { some.ahead(0, 1); })
            return static_cast<const Job*>(j)->ahead(thread, all);
          else
            return {};
        });
  }

  // Waits until no late worker is inside a job that retake() left.
  void quiesce();

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
  using Compute = void (*)(const void*, int, Scratch&);
  using Commit = void (*)(const void*, int, const Scratch&);
  using Ahead = Range (*)(const void*, int, int);
  static constexpr uint32_t kClosed = 1u << 31;
  static constexpr int kJobBytes = 384;

  struct Worker {
    std::thread thread;
    alignas(64) std::atomic<uint32_t> ticket{0};  // raised to announce a job
  };

  // A job. Its plain members are written by the caller while it is closed and nobody is inside.
  struct Slot {
    alignas(64) std::atomic<uint32_t> inside{kClosed};  // workers inside, and whether more may come in
    Task task = nullptr;
    void* context = nullptr;
    int threads = 0;
    std::exception_ptr error;
    std::atomic<bool> failed{false};
    // Of retake() alone.
    alignas(64) unsigned char job[kJobBytes];
    Compute compute = nullptr;
    Commit commit = nullptr;
    Ahead ahead = nullptr;
    int pieces = 0, shares = 0;
    struct Share {  // pieces of a retake() that nobody has begun: the first in the low half, the end in the high one
      alignas(64) std::atomic<uint64_t> left{0};
    };
    Share share[kMostShares];
    std::atomic<int> done{0};
    std::atomic<uint8_t> state[kMostPieces] = {};  // of each piece: open, being committed, done

    void take_part(int number);
    int take_piece(int number);
    void take_pieces(int number);
    bool finish(int piece);
  };

  void run_erased(int threads, Task task, void* context);
  void retake_erased(int threads, int pieces, const void* job, size_t bytes, Compute compute, Commit commit,
                     Ahead ahead);
  int available(int threads);
  void wait_for_ticket(Worker& worker, uint32_t seen);
  void grow(int workers);
  void work(Worker& worker, int number);
  Slot& free_slot();
  void open(Slot& slot, int threads, Task task, void* context);

  std::mutex mutex_;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::vector<std::unique_ptr<Slot>> slots_;  // one, and one more for each worker that is late in a retake()
  std::atomic<Slot*> current_{nullptr};
  std::atomic<bool> stop_{false};
};

// The one pool of the process.
ThreadPool& pool();

}  // namespace hasten
