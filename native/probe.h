// Ceilings: how fast this machine reads memory and multiplies, with every thread at work. What is left out is all that
// costs time in a real kernel (loads, scales, conversions), so a kernel's rate is a fraction of these.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace hasten {

// A loop of nothing but multiply-adds on registers, enough of them independent to keep every unit busy.
struct Peak {
  void (*run)(int64_t rounds) = nullptr;  // null: the instruction set has nothing of this kind
  double ops = 0;                         // operations a round; a multiply-add is two
};

// One instruction set's loops: native/isa/probe_*.cpp.
struct ProbeKernels {
  const char* name;
  // Reads `bytes` (a multiple of 2048, aligned to 64) as `streams` (1, 2 or 4) interleaved streams, prefetching `ahead`
  // bytes ahead in each; 0 leaves it to the hardware. Returns something that depends on every byte.
  uint64_t (*read)(const uint8_t* data, size_t bytes, int streams, int ahead);
  Peak int8, bf16, fp32;
};

extern const ProbeKernels kProbeScalar;
#if defined(__x86_64__)
extern const ProbeKernels kProbeAvx2;
extern const ProbeKernels kProbeAvx512;
extern const ProbeKernels kProbeAmx;
#elif defined(__aarch64__)
extern const ProbeKernels kProbeNeon;
extern const ProbeKernels kProbeDotprod;
extern const ProbeKernels kProbeI8mm;
#endif

// Those that run here, best last.
const std::vector<const ProbeKernels*>& probe_kernels();

struct ReadRates {
  size_t bytes = 0;                // read in each round
  std::vector<double> gb_per_s{};  // 1e9 bytes a second, one a round
};

// Reads a buffer of `bytes` once a round, all threads together: from memory, if it is more than any cache can hold.
// Tries a few ways of reading for a third of the time, then repeats the fastest. At least 5 rounds, unless they alone
// take longer than twice `seconds`. The buffer ends up smaller if the system needs more than twice `seconds` to hand it
// out (a virtual machine that was never given the memory before). Throws std::bad_alloc.
ReadRates measure_read(int threads, size_t bytes, double seconds);

// 1e12 operations a second of each round of about 15 ms, all threads together. At least 5 rounds.
std::vector<double> measure_peak(const Peak& peak, int threads, double seconds);

}  // namespace hasten
