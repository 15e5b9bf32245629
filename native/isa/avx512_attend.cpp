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
  const int d = a.head_dim;
  const bf16* panels[2] = {a.k[page], a.k[page] + 16 * d};
  __m512 sum[M][2];
  repeat<M>(HASTEN_EACH(m) { sum[m][0] = sum[m][1] = _mm512_setzero_ps(); });
  dot_tile<M, 2>(panels, a.q + static_cast<size_t>(row) * d, d, d / 2, sum);
  float* scores = a.scores + static_cast<size_t>(row) * kScoreRow + page * kPageTokens;
  repeat<M>(
      HASTEN_EACH(m) { repeat<2>(HASTEN_EACH(r) { _mm512_storeu_ps(scores + m * kScoreRow + 16 * r, sum[m][r]); }); });
}

// Two panels of 16 dims for M rows over all pages of the part.
template <int M>
void value_rows(const AttendPart& a, int row, int dim) {
  __m512 sum[M][2];
  repeat<M>(HASTEN_EACH(m) { sum[m][0] = sum[m][1] = _mm512_setzero_ps(); });
  for (int page = 0; page < a.pages; page++) {
    const bf16* panels[2] = {a.v[page] + dim * kPageTokens, a.v[page] + (dim + 16) * kPageTokens};
    dot_tile<M, 2>(panels, a.weights + static_cast<size_t>(row) * kWeightRow + page * kPageTokens, kWeightRow,
                   kPageTokens / 2, sum);
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

inline bool sees_all(const AttendPart& a, int row, int tokens) {
  return a.first + tokens - 1 <= a.position[row] && (a.window == 0 || a.first > a.position[row] - a.window);
}

// 16 scores of a row from token t on, with their scales, soft-cap and mask.
inline __m512 finished(const AttendPart& a, int row, int t, bool all_seen, __m512 v) {
  if (a.k_scale) v = _mm512_mul_ps(v, _mm512_loadu_ps(a.k_scale[t / kPageTokens] + t % kPageTokens));
  if (a.softcap > 0) v = _mm512_mul_ps(tanh(_mm512_div_ps(v, _mm512_set1_ps(a.softcap))), _mm512_set1_ps(a.softcap));
  if (all_seen) return v;
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 seen = visible(a, row, _mm512_add_epi32(lane, _mm512_set1_epi32(a.first + t)));
  return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, v);
}

// 2^x for x <= 0 by a polynomial of degree 4 (relative error below 5e-6, where a weight is rounded to 2e-3); minus
// infinity gives 0, 0 exactly 1, NaN stays NaN. Both instructions take the whole part of x by rounding down.
inline __m512 power_of_two(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, 9);  // 0 for an infinity
  __m512 p = _mm512_set1_ps(0.013426684774458408f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.052242472767829895f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.241280198097229f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.6930448412895203f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, x);
}

constexpr float kLog2E = 1.44269504088896341f;

// The weights of a page's scores, in bf16 where they belong; their sum is added to. `top`: the row's largest score
// times log2(e).
inline void put_weights(const AttendPart& a, int page, const __m512 (&v)[2], __m512 top, bf16* weights, __m512& sum) {
  __m512 e[2];
  repeat<2>(HASTEN_EACH(i) {
    e[i] = power_of_two(_mm512_fmsub_ps(v[i], _mm512_set1_ps(kLog2E), top));
    sum = _mm512_add_ps(sum, e[i]);
    if (a.v_scale) {  // of a token that is not seen it may be anything
      const __mmask16 seen = _mm512_cmp_ps_mask(v[i], _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
      e[i] = _mm512_maskz_mul_ps(seen, e[i], _mm512_loadu_ps(a.v_scale[page] + 16 * i));
    }
  });
  _mm512_storeu_si512(weights + page * kPageTokens, (__m512i)_mm512_cvtne2ps_pbh(e[1], e[0]));
}

// A whole part whose scores are final: they stay in registers between the two passes.
inline float weigh_whole_part(const AttendPart& a, const float* s, bf16* weights, float& sum) {
  constexpr int kPages = kPartTokens / kPageTokens;
  __m512 v[kPages][2], most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
  repeat<kPages>(HASTEN_EACH(p) {
    repeat<2>(HASTEN_EACH(i) {
      v[p][i] = _mm512_loadu_ps(s + p * kPageTokens + 16 * i);
      if (a.k_scale) v[p][i] = _mm512_mul_ps(v[p][i], _mm512_loadu_ps(a.k_scale[p] + 16 * i));
      most = _mm512_max_ps(v[p][i], most);  // NaN is left out: it must not become the others' largest
    });
  });
  const float top = _mm512_reduce_max_ps(most);
  const __m512 tops = _mm512_set1_ps(top * kLog2E);
  repeat<kPages>(HASTEN_EACH(p) { put_weights(a, p, v[p], tops, weights, total); });
  sum = _mm512_reduce_add_ps(total);
  return top;
}

inline float weigh_part(const AttendPart& a, int row, bool all_seen, float* s, bf16* weights, float& sum) {
  __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
  for (int t = 0; t < a.pages * kPageTokens; t += 16) {
    const __m512 v = finished(a, row, t, all_seen, _mm512_loadu_ps(s + t));
    _mm512_storeu_ps(s + t, v);
    most = _mm512_max_ps(v, most);
  }
  const float top = _mm512_reduce_max_ps(most);
  const __m512 tops = _mm512_set1_ps(top * kLog2E);
  for (int page = 0; page < a.pages; page++) {
    const float* of_page = s + page * kPageTokens;
    put_weights(a, page, {_mm512_loadu_ps(of_page), _mm512_loadu_ps(of_page + 16)}, tops, weights, total);
  }
  sum = _mm512_reduce_add_ps(total);
  return top;
}

// Rows that see nothing, or nothing but scores of minus infinity: the differences to their largest score are NaN.
inline void weigh_nothing(const AttendPart& a, int row, const float* s, int tokens, bf16* weights) {
  std::fill(weights, weights + tokens, bf16{0});
  a.sum[row] = 0;
  for (int t = 0; t < tokens; t++)
    if (std::isnan(s[t])) a.sum[row] = s[t], weights[t] = 0x7fc0;
}

}  // namespace

void softmax_rows(const AttendPart& a, int first, int count, float* s, bf16* weights) {
  const int tokens = a.pages * kPageTokens;
  for (int row = first; row < first + count; row++, s += kScoreRow, weights += kWeightRow) {
    const bool all_seen = sees_all(a, row, tokens);
    const bool is_whole = tokens == kPartTokens && all_seen && a.softcap == 0;
    a.max[row] =
        is_whole ? weigh_whole_part(a, s, weights, a.sum[row]) : weigh_part(a, row, all_seen, s, weights, a.sum[row]);
    if (a.max[row] == -INFINITY) weigh_nothing(a, row, s, tokens, weights);
  }
}

void attend(const AttendPart& a) {
  for (int page = 0; page < a.pages; page++) {
    fetch_beside(a, page);
    by_rows<ScoreRows>(a, page);
  }
  softmax_rows(a, 0, a.rows, a.scores, a.weights);
  for (int dim = 0; dim < a.head_dim; dim += 32) by_rows<ValueRows>(a, dim);
}

}  // namespace hasten::avx512
