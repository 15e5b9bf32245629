// AVX2 with FMA. 16 registers: 12 hold sums, which covers a latency of 5 cycles on two ports.
#include <immintrin.h>

#include "probe.h"
#include "probe_loop.inl"

namespace hasten {
namespace {

constexpr int kSums = 12;

// Unsigned times signed bytes to 16 bits, pairs to 32, added: AVX2 has no single instruction for it.
void int8_peak(int64_t rounds) {
  __m256i a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(2), ones = _mm256_set1_epi16(1);
  opaque(b), opaque(ones);
  repeat(rounds, Twelve{}, _mm256_setzero_si256(), [&](__m256i& sum) {
    opaque(a);  // else the product is computed once
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
  });
}

// A pair of bf16 weights becomes two floats, by a shift and by a mask, each multiplied and added.
void bf16_peak(int64_t rounds) {
  __m256 x = _mm256_set1_ps(0.5f);
  __m256i pair = _mm256_set1_epi16(0x3f80), high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  opaque(x), opaque(high);
  repeat(rounds, Twelve{}, _mm256_setzero_ps(), [&](__m256& sum) {
    opaque(pair);
    sum = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)), x, sum);
    sum = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(pair, high)), x, sum);
  });
}

void fp32_peak(int64_t rounds) {
  __m256 a = _mm256_set1_ps(1.0f), b = _mm256_set1_ps(0.5f);
  opaque(a), opaque(b);
  repeat(rounds, Twelve{}, _mm256_setzero_ps(), [&](__m256& sum) { sum = _mm256_fmadd_ps(a, b, sum); });
}

}  // namespace

constinit const ProbeKernels kProbeAvx2 = {
    "avx2",
    read_by<__m256i>,
    {int8_peak, 2.0 * 32 * kSums},
    {bf16_peak, 2.0 * 16 * kSums},
    {fp32_peak, 2.0 * 8 * kSums},
};

}  // namespace hasten
