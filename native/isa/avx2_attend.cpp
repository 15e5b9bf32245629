// Attention over one part of the context on AVX2: scores, softmax, weighted values, as avx512_attend.cpp.
#include <cmath>

#include "isa/avx2.h"
#include "isa/avx2_math.inl"

namespace hasten::avx2 {
namespace {

constexpr int kTile = 4;

inline void store_panel(float* out, const __m256 (&sum)[1][2]) {
  for (int h = 0; h < 2; h++) _mm256_storeu_ps(out + 8 * h, sum[0][h]);
}

// Scores of M rows against 16 tokens.
template <int M>
void score_rows(const AttendPart& a, int row, int token) {
  const int d = a.head_dim, tokens = a.pages * kPageTokens;
  const bf16* panel = a.k[token / kPageTokens] + token % kPageTokens * d;
  __m256 sum[M][1][2] = {};
  dot_tile<M, 1>(&panel, a.q + static_cast<size_t>(row) * d, d, d / 2, sum);
  for (int m = 0; m < M; m++) store_panel(a.scores + static_cast<size_t>(row + m) * tokens + token, sum[m]);
}

// 16 dims of M rows over all pages of the part.
template <int M>
void value_rows(const AttendPart& a, int row, int dim) {
  const int tokens = a.pages * kPageTokens;
  __m256 sum[M][1][2] = {};
  for (int page = 0; page < a.pages; page++) {
    const bf16* panel = a.v[page] + dim * kPageTokens;
    const bf16* weights = a.weights + static_cast<size_t>(row) * tokens + page * kPageTokens;
    dot_tile<M, 1>(&panel, weights, tokens, kPageTokens / 2, sum);
  }
  for (int m = 0; m < M; m++) store_panel(a.out + static_cast<size_t>(row + m) * a.head_dim + dim, sum[m]);
}

using Rows = void (*)(const AttendPart&, int row, int where);

// Works through all rows in tiles: many[i] takes i + 1 of them.
void by_rows(const AttendPart& a, int where, const Rows (&many)[kTile]) {
  int row = 0;
  for (; row + kTile <= a.rows; row += kTile) many[kTile - 1](a, row, where);
  if (row < a.rows) many[a.rows - row - 1](a, row, where);
}

inline __m256 visible(const AttendPart& a, int row, __m256i position) {
  const __m256i here = _mm256_set1_epi32(a.position[row]);
  const __m256i later = _mm256_cmpgt_epi32(position, here);
  if (a.window == 0) return _mm256_castsi256_ps(_mm256_andnot_si256(later, _mm256_set1_epi32(-1)));
  const __m256i near = _mm256_cmpgt_epi32(position, _mm256_sub_epi32(here, _mm256_set1_epi32(a.window)));
  return _mm256_castsi256_ps(_mm256_andnot_si256(later, near));
}

// Scales, caps and masks a row's scores; returns the largest number among them.
float mask_scores(const AttendPart& a, int row, int tokens, float* s) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 none = _mm256_set1_ps(-INFINITY), cap = _mm256_set1_ps(a.softcap);
  __m256 most = none;
  for (int t = 0; t < tokens; t += 8) {
    __m256 v = _mm256_loadu_ps(s + t);
    if (a.k_scale) v = _mm256_mul_ps(v, _mm256_loadu_ps(a.k_scale[t / kPageTokens] + t % kPageTokens));
    if (a.softcap > 0) v = _mm256_mul_ps(tanh(_mm256_div_ps(v, cap)), cap);
    v = _mm256_blendv_ps(none, v, visible(a, row, _mm256_add_epi32(lane, _mm256_set1_epi32(a.first + t))));
    _mm256_storeu_ps(s + t, v);
    most = _mm256_max_ps(v, most);  // NaN is left out: it must not become the others' largest
  }
  return largest_of(most);
}

void softmax_part(const AttendPart& a) {
  const int tokens = a.pages * kPageTokens;
  const __m256 none = _mm256_set1_ps(-INFINITY);
  for (int row = 0; row < a.rows; row++) {
    float* s = a.scores + static_cast<size_t>(row) * tokens;
    const float top = mask_scores(a, row, tokens, s);
    __m256 sum[2] = {};
    bf16* weights = a.weights + static_cast<size_t>(row) * tokens;
    for (int t = 0; t < tokens; t += 8) {
      const __m256 v = _mm256_loadu_ps(s + t), seen = _mm256_cmp_ps(v, none, _CMP_NEQ_UQ);  // NaN too
      __m256 e = _mm256_and_ps(seen, exp(_mm256_sub_ps(v, _mm256_set1_ps(top))));
      sum[t / 8 % 2] = _mm256_add_ps(sum[t / 8 % 2], e);
      if (a.v_scale) {
        const __m256 scale = _mm256_loadu_ps(a.v_scale[t / kPageTokens] + t % kPageTokens);
        e = _mm256_and_ps(seen, _mm256_mul_ps(e, scale));
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(weights + t), to_bf16(e));
    }
    a.max[row] = top;
    a.sum[row] = sum_of(sum[0], sum[1]);
  }
}

}  // namespace

void attend(const AttendPart& a) {
  for (int token = 0; token < a.pages * kPageTokens; token += 16)
    by_rows(a, token, {score_rows<1>, score_rows<2>, score_rows<3>, score_rows<4>});
  softmax_part(a);
  for (int dim = 0; dim < a.head_dim; dim += 16)
    by_rows(a, dim, {value_rows<1>, value_rows<2>, value_rows<3>, value_rows<4>});
}

}  // namespace hasten::avx2
