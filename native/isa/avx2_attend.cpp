// Attention over one part of the context on AVX2: scores, softmax, weighted values, as avx512_attend.cpp.
//
// AVX2 has no instruction for pairs of bf16. With many query rows, keys and values are turned into floats once and the
// tiles read floats: 6 rows by 16 columns, bound by the multiply-adds. With few rows the tiles take the pairs apart as
// they go. Both add the same products in the same order, so a row's bits do not depend on how many others there are.
#include <algorithm>
#include <cmath>

#include "isa/avx2.h"
#include "isa/avx2_math.inl"
#include "isa/repeat.h"
#include "memory.h"

namespace hasten::avx2 {
namespace {

constexpr int kTile = 6;      // rows of a tile: 12 registers of sums
constexpr int kRows = 48;     // rows whose scores are held at a time: with 256 tokens, 48 KB, which stay in L2
constexpr int kFewRows = 12;  // up to here, turning keys and values into floats costs more than it saves

// Floats of a part, reused by the next one: queries, then keys, then values.
using Scratch = HugeVector<float>;

// The pairs of bf16 of [pairs][16][2] as floats [2 * pairs][16].
void to_panel(const bf16* from, int pairs, float* out) {
  for (int i = 0; i < pairs; i++)
    for (int h = 0; h < 2; h++) {
      const __m256i pair = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * i + 16 * h));
      _mm256_storeu_ps(out + 32 * i + 8 * h, first_of(pair));
      _mm256_storeu_ps(out + 32 * i + 16 + 8 * h, second_of(pair));
    }
}

// One part as the tiles read it.
struct Work {
  const AttendPart& a;
  const float* q;  // [rows][head_dim]
  const float* k;  // per 16 tokens: [head_dim][16]; null: the tiles read the pages
  const float* v;  // per 16 dims: [tokens][16]
  int tokens;

  Work(const AttendPart& part, Scratch& scratch) : a(part), tokens(part.pages * kPageTokens) {
    const int d = a.head_dim;
    const size_t queries = static_cast<size_t>(a.rows) * d, panel = static_cast<size_t>(kPartTokens) * d;
    const bool panels = a.rows > kFewRows;
    const size_t floats = queries + (panels ? 2 * panel : 0);
    if (scratch.size() < floats) scratch.resize(floats);
    float* const keys = scratch.data() + queries;
    float* const values = keys + panel;
    for (size_t i = 0; i < queries; i += 8) _mm256_storeu_ps(scratch.data() + i, bf16_to_floats(a.q + i));
    q = scratch.data();
    k = v = nullptr;
    if (!panels) return;
    for (int page = 0; page < a.pages; page++) {
      to_panel(a.k[page], d, keys + static_cast<size_t>(page) * kPageTokens * d);
      for (int dim = 0; dim < d; dim += 16)
        to_panel(a.v[page] + dim * kPageTokens, kPageTokens / 2,
                 values + static_cast<size_t>(dim) * tokens + page * kPageTokens * 16);
    }
    k = keys;
    v = values;
  }
};

template <int M>
using Sums = __m256[M][2];

template <int M>
inline void multiply(__m256 low, __m256 high, const float* x, size_t ldx, Sums<M>& sum) {
  repeat<M>(HASTEN_EACH(m) {
    const __m256 by = _mm256_broadcast_ss(x + m * ldx);
    sum[m][0] = _mm256_fmadd_ps(low, by, sum[m][0]);
    sum[m][1] = _mm256_fmadd_ps(high, by, sum[m][1]);
  });
}

// sum[m] += x[m] . panel, which is floats [depth][16].
template <int M>
inline void add_floats(const float* panel, int depth, const float* x, size_t ldx, Sums<M>& sum) {
  for (int i = 0; i < depth; i++)
    multiply<M>(_mm256_loadu_ps(panel + 16 * i), _mm256_loadu_ps(panel + 16 * i + 8), x + i, ldx, sum);
}

// The same of pairs of bf16, [depth / 2][16][2].
template <int M>
inline void add_pairs(const bf16* panel, int depth, const float* x, size_t ldx, Sums<M>& sum) {
  for (int i = 0; i < depth; i += 2) {
    const auto* pairs = reinterpret_cast<const __m256i*>(panel + 16 * i);
    const __m256i low = _mm256_loadu_si256(pairs), high = _mm256_loadu_si256(pairs + 1);
    multiply<M>(first_of(low), first_of(high), x + i, ldx, sum);
    multiply<M>(second_of(low), second_of(high), x + i + 1, ldx, sum);
  }
}

template <int M>
inline void store_sums(float* out, size_t ldo, const Sums<M>& sum) {
  repeat<M>(HASTEN_EACH(m) {
    _mm256_storeu_ps(out + m * ldo, sum[m][0]);
    _mm256_storeu_ps(out + m * ldo + 8, sum[m][1]);
  });
}

template <int M>
inline void clear(Sums<M>& sum) {
  repeat<M>(HASTEN_EACH(m) { sum[m][0] = sum[m][1] = _mm256_setzero_ps(); });
}

// Scores of M rows from `row` on against 16 tokens; `at` is where the row's scores are.
template <int M>
void score_rows(const Work& w, int row, float* at, int token) {
  const int d = w.a.head_dim;
  const float* q = w.q + static_cast<size_t>(row) * d;
  Sums<M> sum;
  clear<M>(sum);
  if (w.k != nullptr)
    add_floats<M>(w.k + static_cast<size_t>(token) * d, d, q, d, sum);
  else
    add_pairs<M>(w.a.k[token / kPageTokens] + token % kPageTokens * d, d, q, d, sum);
  store_sums<M>(at + token, w.tokens, sum);
}

// 16 dims of M rows over all tokens of the part; `at` is where the row's weights are.
template <int M>
void value_rows(const Work& w, int row, float* at, int dim) {
  Sums<M> sum;
  clear<M>(sum);
  if (w.v != nullptr)
    add_floats<M>(w.v + static_cast<size_t>(dim) * w.tokens, w.tokens, at, w.tokens, sum);
  else
    for (int page = 0; page < w.a.pages; page++)
      add_pairs<M>(w.a.v[page] + dim * kPageTokens, kPageTokens, at + page * kPageTokens, w.tokens, sum);
  store_sums<M>(w.a.out + static_cast<size_t>(row) * w.a.head_dim + dim, w.a.head_dim, sum);
}

using Rows = void (*)(const Work&, int row, float* at, int where);

// Works through rows in tiles of nearly the same size: many[i] takes i + 1 of them. Seven rows are 4 + 3, not 6 + 1,
// whose last row would wait for its own sums.
void by_rows(const Work& w, int first, int rows, int where, const Rows (&many)[kTile]) {
  const int tiles = (rows + kTile - 1) / kTile;
  for (int i = 0; i < tiles; i++) {
    const int row = rows * i / tiles, count = rows * (i + 1) / tiles - row;
    many[count - 1](w, first + row, w.a.scores + static_cast<size_t>(row) * w.tokens, where);
  }
}

inline __m256 visible(const AttendPart& a, int row, __m256i position) {
  const __m256i here = _mm256_set1_epi32(a.position[row]);
  const __m256i later = _mm256_cmpgt_epi32(position, here);
  if (a.window == 0) return _mm256_castsi256_ps(_mm256_andnot_si256(later, _mm256_set1_epi32(-1)));
  const __m256i near = _mm256_cmpgt_epi32(position, _mm256_sub_epi32(here, _mm256_set1_epi32(a.window)));
  return _mm256_castsi256_ps(_mm256_andnot_si256(later, near));
}

bool sees_all(const AttendPart& a, int row, int tokens) {
  const int here = a.position[row];
  return a.first + tokens - 1 <= here && (a.window == 0 || a.first > here - a.window);
}

// Scales, caps and masks a row's scores; returns the largest number among them.
float mask_scores(const AttendPart& a, int row, int tokens, float* s) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 none = _mm256_set1_ps(-INFINITY), cap = _mm256_set1_ps(a.softcap);
  const bool all = sees_all(a, row, tokens), as_it_is = all && a.k_scale == nullptr && a.softcap == 0;
  __m256 most = none;
  for (int t = 0; t < tokens; t += 8) {
    __m256 v = _mm256_loadu_ps(s + t);
    if (!as_it_is) {
      if (a.k_scale) v = _mm256_mul_ps(v, _mm256_loadu_ps(a.k_scale[t / kPageTokens] + t % kPageTokens));
      if (a.softcap > 0) v = _mm256_mul_ps(tanh(_mm256_div_ps(v, cap)), cap);
      if (!all) v = _mm256_blendv_ps(none, v, visible(a, row, _mm256_add_epi32(lane, _mm256_set1_epi32(a.first + t))));
      _mm256_storeu_ps(s + t, v);
    }
    most = _mm256_max_ps(v, most);  // NaN is left out: it must not become the others' largest
  }
  return largest_of(most);
}

// Rounded to bf16, as a float. A NaN may become any number: it is for weights whose sum is NaN already.
inline __m256 round_to_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  return _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}

// A row's scores become weights: exp(score - max), rounded to bf16. Its max and sum are stored.
void softmax_row(const AttendPart& a, int row, int tokens, float* s) {
  const float top = mask_scores(a, row, tokens, s);
  const __m256 none = _mm256_set1_ps(-INFINITY), log2e = _mm256_set1_ps(1.44269504088896341f);
  // Where nothing is seen, 0 keeps "minus infinity less the largest" what it is.
  const __m256 largest = _mm256_set1_ps(top == -INFINITY ? 0.0f : top);
  __m256 sum[2] = {};
  for (int t = 0; t < tokens; t += 16)
    for (int h = 0; h < 2; h++) {
      float* at = s + t + 8 * h;
      const __m256 v = _mm256_loadu_ps(at);
      const __m256 e = power_of_two(_mm256_mul_ps(_mm256_sub_ps(v, largest), log2e));
      sum[h] = _mm256_add_ps(sum[h], e);
      __m256 weight = round_to_bf16(e);
      if (a.v_scale) {
        const __m256 scale = _mm256_loadu_ps(a.v_scale[t / kPageTokens] + t % kPageTokens + 8 * h);
        const __m256 seen = _mm256_cmp_ps(v, none, _CMP_NEQ_UQ);  // NaN too
        const __m256 scaled = _mm256_mul_ps(e, scale), nan = _mm256_cmp_ps(scaled, scaled, _CMP_UNORD_Q);
        weight = _mm256_and_ps(seen, _mm256_or_ps(round_to_bf16(scaled), nan));
      }
      _mm256_storeu_ps(at, weight);
    }
  a.max[row] = top;
  a.sum[row] = sum_of(sum[0], sum[1]);
}

}  // namespace

void attend(const AttendPart& a) {
  static thread_local Scratch scratch;
  const Work w(a, scratch);
  for (int first = 0; first < a.rows; first += kRows) {
    const int rows = std::min(kRows, a.rows - first);
    for (int token = 0; token < w.tokens; token += 16) {
      if (token % kPageTokens == 0) fetch_beside(a, token / kPageTokens);
      by_rows(w, first, rows, token,
              {score_rows<1>, score_rows<2>, score_rows<3>, score_rows<4>, score_rows<5>, score_rows<6>});
    }
    for (int row = 0; row < rows; row++)
      softmax_row(a, first + row, w.tokens, a.scores + static_cast<size_t>(row) * w.tokens);
    for (int dim = 0; dim < a.head_dim; dim += 16)
      by_rows(w, first, rows, dim,
              {value_rows<1>, value_rows<2>, value_rows<3>, value_rows<4>, value_rows<5>, value_rows<6>});
  }
}

}  // namespace hasten::avx2
