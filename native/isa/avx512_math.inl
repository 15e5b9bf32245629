// Vector exp and tanh for AVX512, and tiles of bf16 dot products.
#include <immintrin.h>

#include <cstring>

#include "isa/repeat.h"
#include "layout.h"
#include "numeric.h"

namespace hasten::avx512 {
namespace {

// e^x by range reduction to [-ln2/2, ln2/2] and a polynomial of degree 6 (relative error below 1e-7); below -87 it is
// 0; NaN stays NaN.
inline __m512 exp(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145751953125f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.428606765330187e-06f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  const __m512 value = _mm512_scalef_ps(p, n);
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.3f), _CMP_NLE_UQ), value);
}

// x / (1 + e^-y); e^-y may overflow to infinity, and the quotient is then 0.
inline __m512 gate_by_sigmoid(__m512 x, __m512 y) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 minus = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_sub_ps(_mm512_setzero_ps(), y));  // NaN stays
  const __m512 e = exp(minus);
  return _mm512_div_ps(x, _mm512_add_ps(one, e));
}

inline __m512 tanh(__m512 x) {  // 1 - 2 / (1 + e^2x)
  const __m512 e = exp(_mm512_min_ps(_mm512_set1_ps(80.0f), _mm512_add_ps(x, x)));
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(one, e)));
}

inline __m512bh broadcast_pair(const bf16* x) {
  int32_t pair;
  std::memcpy(&pair, x, 4);
  return (__m512bh)_mm512_set1_epi32(pair);
}

// sum[m][r] += x[m] . w[r] over `pairs` pairs of inputs; w[r] is [pairs][16][2]. One chain of additions an output, in
// the order of the inputs, whatever M and R.
template <int M, int R>
[[gnu::always_inline]] inline void dot_tile(const bf16* const* w, const bf16* x, size_t ldx, int pairs,
                                            __m512 (&sum)[M][R]) {
  const bf16* panel[R];
  repeat<R>(HASTEN_EACH(r) { panel[r] = w[r]; });
  for (int i = 0; i < pairs; i++) {
    __m512bh weight[R];
    repeat<R>(HASTEN_EACH(r) { weight[r] = (__m512bh)_mm512_loadu_si512(panel[r] + 32 * i); });
    repeat<M>(HASTEN_EACH(m) {
      const __m512bh pair = broadcast_pair(x + m * ldx + 2 * i);
      repeat<R>(HASTEN_EACH(r) { sum[m][r] = _mm512_dpbf16_ps(sum[m][r], weight[r], pair); });
    });
  }
}

}  // namespace
}  // namespace hasten::avx512
