// AVX-512 with VNNI and BF16. 32 registers: 16 hold sums, which covers a latency of 8 on two ports.
#include <immintrin.h>

#include "probe.h"

namespace hasten {
namespace {

constexpr int kSums = 16;

// Keeps a value in its register and the compiler from knowing it.
template <typename T>
inline void opaque(T& value) {
  asm volatile("" : "+v"(value));
}

template <int kStreams>
uint64_t read_streams(const uint8_t* data, size_t bytes, int ahead) {
  const size_t part = bytes / kStreams;
  __m512i sums[8];
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  for (size_t at = 0; at < part; at += 512) {
    for (int s = 0; s < kStreams; s++) {
      const uint8_t* line = data + s * part + at;
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        if (ahead) _mm_prefetch(reinterpret_cast<const char*>(line + ahead + 64 * i), _MM_HINT_T0);
        sums[i] = _mm512_xor_si512(sums[i], _mm512_load_si512(line + 64 * i));
      }
    }
  }
  alignas(64) uint64_t words[8];
  for (int i = 1; i < 8; i++) sums[0] = _mm512_xor_si512(sums[0], sums[i]);
  _mm512_store_si512(words, sums[0]);
  for (int i = 1; i < 8; i++) words[0] ^= words[i];
  return words[0];
}

uint64_t read(const uint8_t* data, size_t bytes, int streams, int ahead) {
  if (streams == 4) return read_streams<4>(data, bytes, ahead);
  return streams == 2 ? read_streams<2>(data, bytes, ahead) : read_streams<1>(data, bytes, ahead);
}

void int8_peak(int64_t rounds) {
  __m512i sums[kSums], a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  opaque(a), opaque(b);
  for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 16
    for (int i = 0; i < kSums; i++) {
      sums[i] = _mm512_dpbusd_epi32(sums[i], a, b);
      opaque(sums[i]);
    }
  }
}

void bf16_peak(int64_t rounds) {
  __m512i a = _mm512_set1_epi16(0x3f80), b = _mm512_set1_epi16(0x3f00);
  opaque(a), opaque(b);
  __m512 sums[kSums];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 16
    for (int i = 0; i < kSums; i++) {
      sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)a, (__m512bh)b);
      opaque(sums[i]);
    }
  }
}

void fp32_peak(int64_t rounds) {
  __m512 sums[kSums], a = _mm512_set1_ps(1.0f), b = _mm512_set1_ps(0.5f);
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  opaque(a), opaque(b);
  for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 16
    for (int i = 0; i < kSums; i++) {
      sums[i] = _mm512_fmadd_ps(a, b, sums[i]);
      opaque(sums[i]);
    }
  }
}

}  // namespace

constinit const ProbeKernels kProbeAvx512 = {
    "avx512", read, {int8_peak, 2.0 * 64 * kSums}, {bf16_peak, 2.0 * 32 * kSums}, {fp32_peak, 2.0 * 16 * kSums},
};

}  // namespace hasten
