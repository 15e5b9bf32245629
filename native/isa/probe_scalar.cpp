// Plain C++, for any processor: what a compiler makes of the obvious loops at the base instruction set.
#include "probe.h"

namespace hasten {
namespace {

constexpr int kLanes = 64;

template <typename Value>
struct Operands {
  alignas(64) Value a[kLanes], b[kLanes];
};

// The compiler must not know what is in there, nor that it stays the same.
template <typename T>
inline void opaque(T& value) {
  asm volatile("" : "+m"(value));
}

uint64_t read(const uint8_t* data, size_t bytes, int streams, int ahead) {
  const size_t part = bytes / streams;
  uint64_t sums[8] = {};
  for (size_t at = 0; at < part; at += 64) {
    for (int s = 0; s < streams; s++) {
      const uint8_t* line = data + s * part + at;
      if (ahead) __builtin_prefetch(line + ahead);
      for (int i = 0; i < 8; i++) {
        uint64_t word;
        __builtin_memcpy(&word, line + 8 * i, 8);
        sums[i] ^= word;
      }
    }
  }
  return sums[0] ^ sums[1] ^ sums[2] ^ sums[3] ^ sums[4] ^ sums[5] ^ sums[6] ^ sums[7];
}

void int8_peak(int64_t rounds) {
  Operands<int8_t> in = {};
  int32_t sum = 0;
  for (int64_t r = 0; r < rounds; r++) {
    opaque(in);
    int32_t dot = 0;
    for (int i = 0; i < kLanes; i++) dot += in.a[i] * in.b[i];
    sum += dot;
  }
  opaque(sum);
}

void bf16_peak(int64_t rounds) {
  Operands<uint16_t> in = {};
  float sums[kLanes] = {};
  for (int64_t r = 0; r < rounds; r++) {
    opaque(in);
    for (int i = 0; i < kLanes; i++)
      sums[i] +=
          __builtin_bit_cast(float, uint32_t{in.a[i]} << 16) * __builtin_bit_cast(float, uint32_t{in.b[i]} << 16);
  }
  opaque(sums);
}

// Sixteen vectors of four, the width every 64-bit processor has; multiplies and adds fuse where the machine can.
using Four = float __attribute__((vector_size(16)));

void fp32_peak(int64_t rounds) {
  constexpr int kVectors = 12;
  Four a = {1, 1, 1, 1}, b = {0.5f, 0.5f, 0.5f, 0.5f};
  opaque(a), opaque(b);
  Four sums[kVectors] = {};
  for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 12
    for (int i = 0; i < kVectors; i++) sums[i] = a * sums[i] + b;
  }
  opaque(sums);
}

}  // namespace

constinit const ProbeKernels kProbeScalar = {
    "scalar", read, {int8_peak, 2.0 * kLanes}, {bf16_peak, 2.0 * kLanes}, {fp32_peak, 2.0 * 12 * 4},
};

}  // namespace hasten
