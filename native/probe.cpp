#include "probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "cpu.h"
#include "threads.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace hasten {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr int kLeastRounds = 5;

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

struct Free {
  void operator()(uint8_t* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<uint8_t, Free>;

// Memory that was written to, so that it exists: pages that nobody wrote to are one shared page of zeros, and reading
// that is reading a cache.
class Touched {
 public:
  Touched(int threads, size_t bytes, double seconds)
      : data_(static_cast<uint8_t*>(std::aligned_alloc(kHugePage, bytes))) {
    if (!data_) throw std::bad_alloc();
#ifdef __linux__
    madvise(data_.get(), bytes, MADV_HUGEPAGE);  // else the page walks of 4 KB pages are measured too
#endif
    const auto start = Clock::now();
    for (; bytes_ < bytes && (bytes_ == 0 || since(start) < seconds); bytes_ = std::min(bytes, bytes_ + kStep)) {
      const size_t first = bytes_ / kHugePage, last = std::min(bytes, bytes_ + kStep) / kHugePage;
      pool().split(threads, static_cast<int>(last - first), 1, [&](int begin, int end, int) {
        for (size_t page = first + begin; page < first + end; page++)
          std::memset(data_.get() + page * kHugePage, static_cast<int>(1 + page % 251), kHugePage);
      });
    }
  }

  const uint8_t* data() const { return data_.get(); }
  size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kStep = 64 * kHugePage;
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t, Free> data_;
  size_t bytes_ = 0;
};

struct Way {
  int streams, ahead;
};
constexpr Way kWays[] = {{1, 0}, {1, 1024}, {1, 4096}, {2, 1024}, {4, 0}, {4, 1024}};

// Seconds to read the buffer once. Threads take the next 2 MB as they become free: a core that others use too
// does not hold up the rest.
double read_once(int threads, const Touched& memory, Way way) {
  const ProbeKernels& k = *probe_kernels().back();
  static std::atomic<uint64_t> sink{0};
  std::atomic<size_t> next{0};
  const auto start = Clock::now();
  pool().run(threads, [&](int) {
    uint64_t sum = 0;
    for (size_t at = next.fetch_add(kHugePage); at < memory.bytes(); at = next.fetch_add(kHugePage))
      sum += k.read(memory.data() + at, kHugePage, way.streams, way.ahead);
    sink.fetch_add(sum, std::memory_order_relaxed);
  });
  return since(start);
}

}  // namespace

const std::vector<const ProbeKernels*>& probe_kernels() {
  static const std::vector<const ProbeKernels*> kernels = [] {
    std::vector<const ProbeKernels*> found{&kProbeScalar};
#if defined(__x86_64__)
    if (has_avx2()) found.push_back(&kProbeAvx2);
    static ProbeKernels no_bf16 = kProbeAvx512;
    no_bf16.name = "avx512vnni";
    no_bf16.bf16 = {};
    if (has_avx512_vnni()) found.push_back(has_avx512() ? &kProbeAvx512 : &no_bf16);
    if (has_amx()) found.push_back(&kProbeAmx);
#elif defined(__aarch64__)
    found.push_back(&kProbeNeon);
    if (has_dotprod()) found.push_back(&kProbeDotprod);
    if (has_i8mm()) found.push_back(&kProbeI8mm);
#endif
    return found;
  }();
  return kernels;
}

ReadRates measure_read(int threads, size_t bytes, double seconds) {
  const Touched memory(threads, std::max(bytes / kHugePage, size_t{1}) * kHugePage, 2 * seconds);
  const double gb = static_cast<double>(memory.bytes()) / 1e9;
  const auto start = Clock::now();
  constexpr size_t kCount = std::size(kWays);
  std::vector<double> rates[kCount];
  auto round = [&](size_t way) { rates[way].push_back(gb / read_once(threads, memory, kWays[way])); };
  do {
    for (size_t i = 0; i < kCount && (i == 0 || since(start) < seconds); i++) round(i);
  } while (since(start) < seconds / 3);
  size_t best = 0;
  for (size_t i = 1; i < kCount; i++)
    if (!rates[i].empty() && std::ranges::max(rates[i]) > std::ranges::max(rates[best])) best = i;
  while (since(start) < seconds || (rates[best].size() < kLeastRounds && since(start) < 2 * seconds)) round(best);
  return {memory.bytes(), rates[best]};
}

std::vector<double> measure_peak(const Peak& peak, int threads, double seconds) {
  constexpr double kRoundSeconds = 0.015;
  int64_t loops = 256;
  for (;; loops *= 2) {  // also brings the clock to where it stays
    const auto start = Clock::now();
    peak.run(loops);
    if (since(start) > kRoundSeconds / 2) break;
  }
  std::vector<double> rounds;
  const auto begin = Clock::now();
  while (rounds.size() < kLeastRounds || since(begin) < seconds) {
    const auto start = Clock::now();
    const int all = pool().everyone(threads, [&] { peak.run(loops); });
    rounds.push_back(peak.ops * static_cast<double>(loops) * all / since(start) / 1e12);
  }
  return rounds;
}

}  // namespace hasten
