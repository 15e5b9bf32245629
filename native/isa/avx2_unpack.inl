// Takes weights out of a packed block, 8 inputs at a time, and multiplies them with int8 activations. A panel's 16 rows
// are two registers, "halves", of [8 rows][4]. See layout.h.
#include <immintrin.h>

#include <cstring>

#include "layout.h"

namespace hasten::avx2 {
namespace {

inline __m256i load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// 32 bits as 32 bytes of 0 or 16.
inline __m256i sixteen_by_bit(const uint8_t* bits) {
  int32_t word;
  std::memcpy(&word, bits, 4);
  const __m256i source = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(word), source), bit);
  return _mm256_and_si256(_mm256_cmpeq_epi8(spread, bit), _mm256_set1_epi8(16));
}

// Inputs 8j .. 8j+3 and 8j+4 .. 8j+7 of half h, unsigned.
template <int BITS>
inline void unpack8(const uint8_t* block, int group, int j, int h, __m256i& first, __m256i& second) {
  if constexpr (BITS == 8) {
    first = load_bytes(block + 128 * j + 32 * h);
    second = load_bytes(block + 128 * j + 64 + 32 * h);
    return;
  }
  const __m256i low = _mm256_set1_epi8(15);
  const __m256i nibbles = load_bytes(block + 64 * j + 32 * h);
  first = _mm256_and_si256(nibbles, low);
  second = _mm256_and_si256(_mm256_srli_epi16(nibbles, 4), low);
  if constexpr (BITS == 5) {
    const uint8_t* bits = block + 8 * group + 16 * j + 4 * h;
    first = _mm256_or_si256(first, sixteen_by_bit(bits));
    second = _mm256_or_si256(second, sixteen_by_bit(bits + 8));
  }
  if constexpr (BITS == 6) {
    const __m256i high = _mm256_set1_epi8(0x30);
    const __m256i plane = load_bytes(block + 8 * group + 64 * (j / 2) + 32 * h);
    const __m256i a = j % 2 ? plane : _mm256_slli_epi16(plane, 4);
    const __m256i b = j % 2 ? _mm256_srli_epi16(plane, 2) : _mm256_slli_epi16(plane, 2);
    first = _mm256_or_si256(first, _mm256_and_si256(a, high));
    second = _mm256_or_si256(second, _mm256_and_si256(b, high));
  }
}

inline __m256 load_scales(const uint8_t* scales) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
}

inline __m256i broadcast4(const int8_t* q) {
  int32_t four;
  std::memcpy(&four, q, 4);
  return _mm256_set1_epi32(four);
}

// VPMADDUBSW adds pairs of products in 16 bits, saturating. What still fits: 8 of 15 * 127 * 2, 4 of 31 * 127 * 2, 2 of
// 63 * 127 * 2. Eight-bit weights would not fit once; they are taken as signed, |w| * (sign(w) q), at most 2 * 128 *
// 127.
template <int BITS>
constexpr int kSumsIn16 = BITS == 4   ? 8
                          : BITS == 5 ? 4
                          : BITS == 6 ? 2
                                      : 1;

// What a weight register is multiplied as: unsigned values, or signed 8-bit ones with their magnitudes.
template <int BITS>
struct Weights {
  __m256i value, magnitude;

  explicit Weights(__m256i u) : value(u), magnitude(u) {
    if constexpr (BITS == 8) {
      value = _mm256_xor_si256(u, _mm256_set1_epi8(static_cast<char>(0x80)));
      magnitude = _mm256_abs_epi8(value);
    }
  }
  __m256i pairs(__m256i q) const { return _mm256_maddubs_epi16(magnitude, BITS == 8 ? _mm256_sign_epi8(q, value) : q); }
};

// gcc turns a chain of integer additions into a tree: all products of a step would wait on the stack for it.
inline __m256i add_in_order(__m256i a, __m256i b) {
  __m256i sum = _mm256_add_epi16(a, b);
  asm("" : "+x"(sum));
  return sum;
}

inline __m256i widen(__m256i sums, __m256i pairs) {
  __m256i sum = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  asm("" : "+x"(sum));
  return sum;
}

}  // namespace
}  // namespace hasten::avx2
