// Attention over one part of the context on VDPBF16PS: all query heads of a KV head together, scores, softmax, weighted
// values. K and V pages have the layout of packed bf16 weights, so both products are the dot tiles of linear layers.
#include <algorithm>
#include <cmath>

#include "isa/avx512.h"
#include "isa/avx512_math.inl"

namespace hasten::avx512 {
namespace {

constexpr int kTile = 8;  // query rows: 16 sums of the 32 registers, and the 7 heads of a group of Qwen's go together

template <int M>
void score_rows(const AttendPart& a, int row, int page) {
  const int d = a.head_dim, tokens = a.pages * kPageTokens;
  const bf16* panels[2] = {a.k[page], a.k[page] + 16 * d};
  __m512 sum[M][2];
  repeat<M>(HASTEN_EACH(m) { sum[m][0] = sum[m][1] = _mm512_setzero_ps(); });
  dot_tile<M, 2>(panels, a.q + static_cast<size_t>(row) * d, d, d / 2, sum);
  float* scores = a.scores + static_cast<size_t>(row) * tokens + page * kPageTokens;
  repeat<M>(
      HASTEN_EACH(m) { repeat<2>(HASTEN_EACH(r) { _mm512_storeu_ps(scores + m * tokens + 16 * r, sum[m][r]); }); });
}

// Two panels of 16 dims for M rows over all pages of the part.
template <int M>
void value_rows(const AttendPart& a, int row, int dim) {
  const int tokens = a.pages * kPageTokens;
  __m512 sum[M][2];
  repeat<M>(HASTEN_EACH(m) { sum[m][0] = sum[m][1] = _mm512_setzero_ps(); });
  for (int page = 0; page < a.pages; page++) {
    const bf16* panels[2] = {a.v[page] + dim * kPageTokens, a.v[page] + (dim + 16) * kPageTokens};
    dot_tile<M, 2>(panels, a.weights + static_cast<size_t>(row) * tokens + page * kPageTokens, tokens, kPageTokens / 2,
                   sum);
  }
  float* out = a.out + static_cast<size_t>(row) * a.head_dim + dim;
  repeat<M>(
      HASTEN_EACH(m) { repeat<2>(HASTEN_EACH(r) { _mm512_storeu_ps(out + m * a.head_dim + 16 * r, sum[m][r]); }); });
}

template <template <int> class Fn>
void by_rows(const AttendPart& a, int where) {
  int row = 0;
  for (; row + kTile <= a.rows; row += kTile) Fn<kTile>::call(a, row, where);
  switch (a.rows - row) {
    case 7: return Fn<7>::call(a, row, where);
    case 6: return Fn<6>::call(a, row, where);
    case 5: return Fn<5>::call(a, row, where);
    case 4: return Fn<4>::call(a, row, where);
    case 3: return Fn<3>::call(a, row, where);
    case 2: return Fn<2>::call(a, row, where);
    case 1: return Fn<1>::call(a, row, where);
    default: return;
  }
}

template <int M>
struct ScoreRows {
  static void call(const AttendPart& a, int row, int page) { score_rows<M>(a, row, page); }
};
template <int M>
struct ValueRows {
  static void call(const AttendPart& a, int row, int dim) { value_rows<M>(a, row, dim); }
};

inline __mmask16 visible(const AttendPart& a, int row, __m512i position) {
  __mmask16 mask = _mm512_cmple_epi32_mask(position, _mm512_set1_epi32(a.position[row]));
  if (a.window > 0) mask &= _mm512_cmpgt_epi32_mask(position, _mm512_set1_epi32(a.position[row] - a.window));
  return mask;
}

}  // namespace

void softmax_part(const AttendPart& a) {
  const int tokens = a.pages * kPageTokens;
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 none = _mm512_set1_ps(-INFINITY);
  for (int row = 0; row < a.rows; row++) {
    float* s = a.scores + static_cast<size_t>(row) * tokens;
    __m512 most = none;
    for (int t = 0; t < tokens; t += 16) {
      __m512 v = _mm512_loadu_ps(s + t);
      if (a.k_scale) v = _mm512_mul_ps(v, _mm512_loadu_ps(a.k_scale[t / kPageTokens] + t % kPageTokens));
      if (a.softcap > 0)
        v = _mm512_mul_ps(tanh(_mm512_div_ps(v, _mm512_set1_ps(a.softcap))), _mm512_set1_ps(a.softcap));
      v = _mm512_mask_mov_ps(none, visible(a, row, _mm512_add_epi32(lane, _mm512_set1_epi32(a.first + t))), v);
      _mm512_storeu_ps(s + t, v);
      most = _mm512_max_ps(v, most);  // NaN is left out: it must not become the others' largest
    }
    const float top = _mm512_reduce_max_ps(most);
    __m512 sum = _mm512_setzero_ps();
    bf16* weights = a.weights + static_cast<size_t>(row) * tokens;
    for (int t = 0; t < tokens; t += 16) {
      const __m512 v = _mm512_loadu_ps(s + t);
      const __mmask16 seen = _mm512_cmp_ps_mask(v, none, _CMP_NEQ_UQ);  // NaN too
      __m512 e = _mm512_maskz_mov_ps(seen, exp(_mm512_sub_ps(v, _mm512_set1_ps(top))));
      sum = _mm512_add_ps(sum, e);
      if (a.v_scale) e = _mm512_maskz_mul_ps(seen, e, _mm512_loadu_ps(a.v_scale[t / kPageTokens] + t % kPageTokens));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + t), (__m256i)_mm512_cvtneps_pbh(e));
    }
    a.max[row] = top;
    a.sum[row] = _mm512_reduce_add_ps(sum);
  }
}

void attend(const AttendPart& a) {
  for (int page = 0; page < a.pages; page++) {
    fetch_beside(a, page);
    by_rows<ScoreRows>(a, page);
  }
  softmax_part(a);
  for (int dim = 0; dim < a.head_dim; dim += 32) by_rows<ValueRows>(a, dim);
}

}  // namespace hasten::avx512
