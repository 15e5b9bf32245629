// Attention over one part of the context on NEON: scores, softmax, weighted values. Keys and values are read as the
// pairs of bf16 that they are, by the tiles of the bf16 layers, so a row's bits do not depend on how many others there
// are.
#include <algorithm>
#include <cmath>

#include "isa/neon.h"
#include "isa/neon_math.inl"

namespace hasten::neon {
namespace {

constexpr int kTile = 4;  // rows

template <int M>
inline void store_rows(float* out, size_t ldo, const Lanes (&sum)[M][1]) {
  repeat<M>(HASTEN_EACH(m) { repeat<4>(HASTEN_EACH(h) { vst1q_f32(out + m * ldo + 4 * h, sum[m][0][h]); }); });
}

// Scores of M rows from `row` on against 16 tokens.
template <int M>
void score_rows(const AttendPart& a, int row, int token) {
  const int d = a.head_dim, tokens = a.pages * kPageTokens;
  const bf16* keys = a.k[token / kPageTokens] + token % kPageTokens * d;
  Lanes sum[M][1] = {};
  dot_tile<M, 1>(&keys, a.q + static_cast<size_t>(row) * d, d, d / 2, sum);
  store_rows<M>(a.scores + static_cast<size_t>(row) * tokens + token, tokens, sum);
}

// 16 dims of M rows over all tokens of the part.
template <int M>
void value_rows(const AttendPart& a, int row, int dim) {
  const int tokens = a.pages * kPageTokens;
  const bf16* weights = a.weights + static_cast<size_t>(row) * tokens;
  Lanes sum[M][1] = {};
  for (int page = 0; page < a.pages; page++) {
    const bf16* values = a.v[page] + dim * kPageTokens;
    dot_tile<M, 1>(&values, weights + page * kPageTokens, tokens, kPageTokens / 2, sum);
  }
  store_rows<M>(a.out + static_cast<size_t>(row) * a.head_dim + dim, a.head_dim, sum);
}

using Rows = void (*)(const AttendPart&, int row, int where);

// Works through rows in tiles: many[i] takes i + 1 of them.
void by_rows(const AttendPart& a, int where, const Rows (&many)[kTile]) {
  for (int row = 0; row < a.rows; row += kTile) many[std::min(kTile, a.rows - row) - 1](a, row, where);
}

// Which of four tokens from `first` on a row may look at.
inline uint32x4_t visible(const AttendPart& a, int row, int first) {
  const int32x4_t lane = {0, 1, 2, 3}, here = vdupq_n_s32(a.position[row]);
  const int32x4_t position = vaddq_s32(vdupq_n_s32(first), lane);
  const uint32x4_t before = vcleq_s32(position, here);
  return a.window == 0 ? before : vandq_u32(before, vcgtq_s32(position, vsubq_s32(here, vdupq_n_s32(a.window))));
}

inline float32x4_t token_scales(const float* const* pages, int t) {
  return vld1q_f32(pages[t / kPageTokens] + t % kPageTokens);
}

// Scales, caps and masks a row's scores; returns the largest number among them.
float mask_scores(const AttendPart& a, int row, int tokens, float* s) {
  const float32x4_t none = vdupq_n_f32(-INFINITY), cap = vdupq_n_f32(a.softcap);
  float32x4_t most = none;
  for (int t = 0; t < tokens; t += 4) {
    float32x4_t v = vld1q_f32(s + t);
    if (a.k_scale) v = vmulq_f32(v, token_scales(a.k_scale, t));
    if (a.softcap > 0) v = vmulq_f32(tanh(vdivq_f32(v, cap)), cap);
    v = vbslq_f32(visible(a, row, a.first + t), v, none);
    vst1q_f32(s + t, v);
    most = vmaxnmq_f32(most, v);  // NaN is left out: it must not become the others' largest
  }
  return vmaxnmvq_f32(most);
}

// A row's scores become weights: exp(score - max), rounded to bf16. Its max and sum are stored.
void softmax_row(const AttendPart& a, int row) {
  const int tokens = a.pages * kPageTokens;
  float* s = a.scores + static_cast<size_t>(row) * tokens;
  bf16* weights = a.weights + static_cast<size_t>(row) * tokens;
  const float top = mask_scores(a, row, tokens, s);
  const float32x4_t none = vdupq_n_f32(-INFINITY);
  // Where nothing is seen, 0 keeps "minus infinity less the largest" what it is.
  const float32x4_t largest = vdupq_n_f32(top == -INFINITY ? 0.0f : top);
  Lanes sum = {};
  for (int t = 0; t < tokens; t += 16)
    for (int h = 0; h < 4; h++) {
      const int at = t + 4 * h;
      const float32x4_t v = vld1q_f32(s + at);
      float32x4_t e = power_of_two(vmulq_n_f32(vsubq_f32(v, largest), 1.44269504088896341f));
      sum[h] = vaddq_f32(sum[h], e);
      if (a.v_scale) e = where(vmvnq_u32(vceqq_f32(v, none)), vmulq_f32(e, token_scales(a.v_scale, at)));
      vst1_u16(weights + at, to_bf16(e));
    }
  a.max[row] = top;
  a.sum[row] = sum_of(sum);
}

}  // namespace

void attend(const AttendPart& a) {
  for (int token = 0; token < a.pages * kPageTokens; token += 16) {
    if (token % kPageTokens == 0) fetch_beside(a, token / kPageTokens);
    by_rows(a, token, {score_rows<1>, score_rows<2>, score_rows<3>, score_rows<4>});
  }
  for (int row = 0; row < a.rows; row++) softmax_row(a, row);
  for (int dim = 0; dim < a.head_dim; dim += 16)
    by_rows(a, dim, {value_rows<1>, value_rows<2>, value_rows<3>, value_rows<4>});
}

}  // namespace hasten::neon
