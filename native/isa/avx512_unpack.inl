// Takes the unsigned weights out of a packed block, 8 inputs (two registers of [16 rows][4]) at a time. `low` points to
// the block's first plane, `high` to the plane of the bits above the fourth, which only 5 and 6 bits have. See
// layout.h.
#include <immintrin.h>

#include <cstring>

#include "layout.h"

namespace hasten::avx512 {
namespace {

template <int BITS>
[[gnu::always_inline]] inline void unpack8(const uint8_t* low, const uint8_t* high, int j, __m512i& first,
                                           __m512i& second) {
  if constexpr (BITS == 8) {
    first = _mm512_loadu_si512(low + 128 * j);
    second = _mm512_loadu_si512(low + 128 * j + 64);
    return;
  }
  const __m512i fifteen = _mm512_set1_epi8(15);
  const __m512i nibbles = _mm512_loadu_si512(low + 64 * j);
  first = _mm512_and_si512(nibbles, fifteen);
  second = _mm512_and_si512(_mm512_srli_epi16(nibbles, 4), fifteen);
  if constexpr (BITS == 5) {
    const __m512i sixteen = _mm512_set1_epi8(16);
    uint64_t bits[2];
    std::memcpy(bits, high + 16 * j, sizeof bits);
    first = _mm512_mask_add_epi8(first, bits[0], first, sixteen);
    second = _mm512_mask_add_epi8(second, bits[1], second, sixteen);
  }
  if constexpr (BITS == 6) {
    const __m512i two_bits = _mm512_set1_epi8(0x30);
    const __m512i plane = _mm512_loadu_si512(high + 64 * (j / 2));
    // 0xf8: a | (b & c)
    const __m512i a = j % 2 ? plane : _mm512_slli_epi16(plane, 4);
    const __m512i b = j % 2 ? _mm512_srli_epi16(plane, 2) : _mm512_slli_epi16(plane, 2);
    first = _mm512_ternarylogic_epi32(first, a, two_bits, 0xf8);
    second = _mm512_ternarylogic_epi32(second, b, two_bits, 0xf8);
  }
}

inline __m512 load_scales(const uint8_t* scales) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
}

// sum[i] += the four products of u[4i..4i+3] and q[0..3]. The four inputs come from memory as part of the instruction:
// where only one register of weights reads them, that saves the load.
[[gnu::always_inline]] inline __m512i dot_broadcast(__m512i sum, __m512i u, const int8_t* q) {
  using Four [[gnu::may_alias]] = int32_t;
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(u), "m"(*reinterpret_cast<const Four*>(q)));
  return sum;
}

inline __m512i broadcast4(const int8_t* q) {
  int32_t four;
  std::memcpy(&four, q, 4);
  return _mm512_set1_epi32(four);
}

}  // namespace
}  // namespace hasten::avx512
