// AVX2 with FMA. 16 registers: 12 hold sums, which covers a latency of 5 on two ports.
#include <immintrin.h>

#include "probe.h"

namespace hasten {
namespace {

constexpr int kSums = 12;

// Keeps a value in its register and the compiler from knowing it.
template <typename T>
inline void opaque(T& value) {
  asm volatile("" : "+x"(value));
}

template <int kStreams>
uint64_t read_streams(const uint8_t* data, size_t bytes, int ahead) {
  const size_t part = bytes / kStreams;
  __m256i sums[8];
  for (auto& sum : sums) sum = _mm256_setzero_si256();
  for (size_t at = 0; at < part; at += 256) {
    for (int s = 0; s < kStreams; s++) {
      const uint8_t* line = data + s * part + at;
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        if (ahead && i % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(line + ahead + 32 * i), _MM_HINT_T0);
        sums[i] = _mm256_xor_si256(sums[i], _mm256_load_si256(reinterpret_cast<const __m256i*>(line) + i));
      }
    }
  }
  alignas(32) uint64_t words[4];
  for (int i = 1; i < 8; i++) sums[0] = _mm256_xor_si256(sums[0], sums[i]);
  _mm256_store_si256(reinterpret_cast<__m256i*>(words), sums[0]);
  return words[0] ^ words[1] ^ words[2] ^ words[3];
}

uint64_t read(const uint8_t* data, size_t bytes, int streams, int ahead) {
  if (streams == 4) return read_streams<4>(data, bytes, ahead);
  return streams == 2 ? read_streams<2>(data, bytes, ahead) : read_streams<1>(data, bytes, ahead);
}

// Unsigned times signed bytes to 16 bits, pairs to 32, added: AVX2 has no single instruction for it.
void int8_peak(int64_t rounds) {
  __m256i sums[kSums], a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(2), ones = _mm256_set1_epi16(1);
  for (auto& sum : sums) sum = _mm256_setzero_si256();
  opaque(b), opaque(ones);
  for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; i++) {
      opaque(a);
      sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
    }
  }
  for (auto& sum : sums) opaque(sum);
}

// A pair of bf16 weights becomes two floats by a shift and a mask, then two multiply-adds.
void bf16_peak(int64_t rounds) {
  __m256 sums[kSums], x = _mm256_set1_ps(0.5f);
  __m256i pair = _mm256_set1_epi16(0x3f80), high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  for (auto& sum : sums) sum = _mm256_setzero_ps();
  opaque(x), opaque(high);
  for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 6
    for (int i = 0; i < kSums; i += 2) {
      opaque(pair);
      sums[i] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)), x, sums[i]);
      sums[i + 1] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(pair, high)), x, sums[i + 1]);
    }
  }
  for (auto& sum : sums) opaque(sum);
}

void fp32_peak(int64_t rounds) {
  __m256 sums[kSums], a = _mm256_set1_ps(1.0f), b = _mm256_set1_ps(0.5f);
  for (auto& sum : sums) sum = _mm256_setzero_ps();
  opaque(a), opaque(b);
  for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; i++) {
      sums[i] = _mm256_fmadd_ps(a, b, sums[i]);
      opaque(sums[i]);
    }
  }
}

}  // namespace

constinit const ProbeKernels kProbeAvx2 = {
    "avx2", read, {int8_peak, 2.0 * 32 * kSums}, {bf16_peak, 2.0 * 8 * kSums}, {fp32_peak, 2.0 * 8 * kSums},
};

}  // namespace hasten
