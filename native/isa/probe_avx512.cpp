// AVX-512 with VNNI and BF16. 32 registers: 16 hold sums, which covers a latency of 8 cycles on two ports.
#include <immintrin.h>

#include "probe.h"
#include "probe_loop.inl"

namespace hasten {
namespace {

constexpr int kSums = 16;

void int8_peak(int64_t rounds) {
  __m512i a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
  opaque(a), opaque(b);
  repeat(rounds, Sixteen{}, _mm512_setzero_si512(), [&](__m512i& sum) { sum = _mm512_dpbusd_epi32(sum, a, b); });
}

void bf16_peak(int64_t rounds) {
  __m512i a = _mm512_set1_epi16(0x3f80), b = _mm512_set1_epi16(0x3f00);
  opaque(a), opaque(b);
  repeat(rounds, Sixteen{}, _mm512_setzero_ps(),
         [&](__m512& sum) { sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); });
}

void fp32_peak(int64_t rounds) {
  __m512 a = _mm512_set1_ps(1.0f), b = _mm512_set1_ps(0.5f);
  opaque(a), opaque(b);
  repeat(rounds, Sixteen{}, _mm512_setzero_ps(), [&](__m512& sum) { sum = _mm512_fmadd_ps(a, b, sum); });
}

}  // namespace

constinit const ProbeKernels kProbeAvx512 = {
    "avx512",
    read_by<__m512i>,
    {int8_peak, 2.0 * 64 * kSums},
    {bf16_peak, 2.0 * 32 * kSums},
    {fp32_peak, 2.0 * 16 * kSums},
};

}  // namespace hasten
