// Vector exp and tanh for AVX2, and tiles of bf16 dot products.
#include <immintrin.h>

#include <cstring>

#include "layout.h"
#include "numeric.h"

namespace hasten::avx2 {
namespace {

// e^x by range reduction to [-ln2/2, ln2/2] and a polynomial of degree 6 (relative error below 1e-7), for x up to 88;
// below -87.3 it is 0. The same steps as the AVX512 kernel's.
inline __m256 exp(__m256 x) {
  const __m256 clamped = _mm256_max_ps(x, _mm256_set1_ps(-87.3f));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(clamped, _mm256_set1_ps(1.44269504088896341f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693145751953125f), clamped);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(1.428606765330187e-06f), r);
  __m256 p = _mm256_set1_ps(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  const __m256 value = _mm256_mul_ps(p, _mm256_castsi256_ps(power));
  const __m256 value_or_nan = _mm256_blendv_ps(value, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(-87.3f), _CMP_LE_OQ), value_or_nan);
}

// 2^y for y <= 0 by the polynomial of numeric.h; 0 below kLowestPower, NaN stays NaN.
inline __m256 power_of_two(__m256 y) {
  const __m256 lowest = _mm256_set1_ps(kLowestPower);
  const __m256 x = _mm256_max_ps(lowest, y);  // in this order, NaN stays
  // In the sum with 1.5 * 2^23 + 127 the fraction is rounded off, and the low bits are the exponent of 2^n.
  const __m256 magic = _mm256_set1_ps(0x1.8p23f + 127.0f), shifted = _mm256_add_ps(x, magic);
  const __m256 f = _mm256_sub_ps(x, _mm256_sub_ps(shifted, magic));
  __m256 p = _mm256_set1_ps(kPowerTerms[0]);
  for (int i = 1; i < 7; i++) p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kPowerTerms[i]));
  const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  return _mm256_andnot_ps(_mm256_cmp_ps(y, lowest, _CMP_LT_OQ), _mm256_mul_ps(p, _mm256_castsi256_ps(power)));
}

// x / (1 + e^-y)
inline __m256 gate_by_sigmoid(__m256 x, __m256 y) {
  const __m256 minus = _mm256_min_ps(_mm256_set1_ps(88.0f), _mm256_sub_ps(_mm256_setzero_ps(), y));  // NaN stays
  return _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.0f), exp(minus)));
}

inline __m256 tanh(__m256 x) {  // 1 - 2 / (1 + e^2x)
  const __m256 e = exp(_mm256_min_ps(_mm256_set1_ps(80.0f), _mm256_add_ps(x, x)));
  const __m256 one = _mm256_set1_ps(1.0f);
  return _mm256_sub_ps(one, _mm256_div_ps(_mm256_set1_ps(2.0f), _mm256_add_ps(one, e)));
}

// Eight floats to bf16, to nearest even; NaN stays NaN.
inline __m128i to_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i wide = _mm256_blendv_epi8(rounded, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}

// The first and the second of each pair of bf16, as floats.
inline __m256 first_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 second_of(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}

inline __m256 bf16_to_floats(const bf16* x) {
  const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
}

inline __m256i broadcast_pair(const bf16* x) {
  int32_t pair;
  std::memcpy(&pair, x, 4);
  return _mm256_set1_epi32(pair);
}

// sum[m][r][half] += x[m] . w[r] over `pairs` pairs of inputs; w[r] is [pairs][16][2]. One chain of additions an
// output, in the order of the inputs, whatever M and R.
template <int M, int R>
inline void dot_tile(const bf16* const* w, const bf16* x, size_t ldx, int pairs, __m256 (&sum)[M][R][2]) {
  for (int i = 0; i < pairs; i++)
    for (int r = 0; r < R; r++) {
      __m256 first[2], second[2];
      for (int h = 0; h < 2; h++) {
        const __m256i weight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w[r] + 32 * i + 16 * h));
        first[h] = first_of(weight);
        second[h] = second_of(weight);
      }
      for (int m = 0; m < M; m++) {
        const __m256i pair = broadcast_pair(x + m * ldx + 2 * i);
        const __m256 x0 = first_of(pair), x1 = second_of(pair);
        for (int h = 0; h < 2; h++)
          sum[m][r][h] = _mm256_fmadd_ps(second[h], x1, _mm256_fmadd_ps(first[h], x0, sum[m][r][h]));
      }
    }
}

inline float largest_of(__m256 v) {
  __m128 most = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}

// The sum of 16 lanes in the order of the other instruction sets: halves first.
inline float sum_of(__m256 low, __m256 high) {
  const __m256 eight = _mm256_add_ps(low, high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace
}  // namespace hasten::avx2
