// Takes the unsigned weights out of a packed block, 8 inputs (two registers of [16 rows][4]) at a time. See layout.h.
#include <immintrin.h>

#include <cstring>

#include "layout.h"

namespace hasten::avx512 {
namespace {

template <int BITS>
[[gnu::always_inline]] inline void unpack8(const uint8_t* block, int group, int j, __m512i& first, __m512i& second) {
  if constexpr (BITS == 8) {
    first = _mm512_loadu_si512(block + 128 * j);
    second = _mm512_loadu_si512(block + 128 * j + 64);
    return;
  }
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i nibbles = _mm512_loadu_si512(block + 64 * j);
  first = _mm512_and_si512(nibbles, low);
  second = _mm512_and_si512(_mm512_srli_epi16(nibbles, 4), low);
  if constexpr (BITS == 5) {
    const __m512i sixteen = _mm512_set1_epi8(16);
    uint64_t bits[2];
    std::memcpy(bits, block + 8 * group + 16 * j, sizeof bits);
    first = _mm512_mask_add_epi8(first, bits[0], first, sixteen);
    second = _mm512_mask_add_epi8(second, bits[1], second, sixteen);
  }
  if constexpr (BITS == 6) {
    const __m512i high = _mm512_set1_epi8(0x30);
    const __m512i plane = _mm512_loadu_si512(block + 8 * group + 64 * (j / 2));
    // 0xf8: a | (b & c)
    const __m512i a = j % 2 ? plane : _mm512_slli_epi16(plane, 4);
    const __m512i b = j % 2 ? _mm512_srli_epi16(plane, 2) : _mm512_slli_epi16(plane, 2);
    first = _mm512_ternarylogic_epi32(first, a, high, 0xf8);
    second = _mm512_ternarylogic_epi32(second, b, high, 0xf8);
  }
}

inline __m512 load_scales(const uint8_t* scales) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
}

inline __m512i broadcast4(const int8_t* q) {
  int32_t four;
  std::memcpy(&four, q, 4);
  return _mm512_set1_epi32(four);
}

}  // namespace
}  // namespace hasten::avx512
