// Plain C++, for any processor: what a compiler makes of the obvious loops at the base instruction set.
#include "probe.h"
#include "probe_loop.inl"

namespace hasten {
namespace {

constexpr int kLanes = 64;

template <typename Value>
struct Operands {
  alignas(64) Value a[kLanes], b[kLanes];
};

// The compiler must not know what is in memory, nor that it stays the same.
template <typename T>
inline void forget(T& memory) {
  asm volatile("" : "+m"(memory));
}

// 16 bytes at a time, which every 64-bit processor loads at once.
using TwoWords = uint64_t __attribute__((vector_size(16), may_alias));

void int8_peak(int64_t rounds) {
  Operands<int8_t> in = {};
  int32_t sum = 0;
  for (int64_t r = 0; r < rounds; r++) {
    forget(in);
    int32_t dot = 0;
    for (int i = 0; i < kLanes; i++) dot += in.a[i] * in.b[i];
    sum += dot;
  }
  forget(sum);
}

void bf16_peak(int64_t rounds) {
  Operands<uint16_t> in = {};
  float sums[kLanes] = {};
  for (int64_t r = 0; r < rounds; r++) {
    forget(in);
    for (int i = 0; i < kLanes; i++)
      sums[i] +=
          __builtin_bit_cast(float, uint32_t{in.a[i]} << 16) * __builtin_bit_cast(float, uint32_t{in.b[i]} << 16);
  }
  forget(sums);
}

// Vectors of four, which every 64-bit processor has; multiplies and adds fuse where the base instruction set can.
using Four = float __attribute__((vector_size(16)));

void fp32_peak(int64_t rounds) {
  Four a = {1, 1, 1, 1}, b = {0.5f, 0.5f, 0.5f, 0.5f};
  opaque(a), opaque(b);
  repeat(rounds, Twelve{}, Four{}, [&](Four& sum) { sum = a * sum + b; });
}

}  // namespace

constinit const ProbeKernels kProbeScalar = {
    "scalar", read_by<TwoWords>, {int8_peak, 2.0 * kLanes}, {bf16_peak, 2.0 * kLanes}, {fp32_peak, 2.0 * 12 * 4},
};

}  // namespace hasten
