// AVX512: bf16 linear layers on VDPBF16PS and the element-wise kernels. Integer layers: avx512_linear.cpp; attention:
// avx512_attend.cpp.
#include "isa/avx512.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "isa/avx2.h"
#include "isa/avx512_math.inl"

namespace hasten::avx512 {
namespace {

constexpr int kTile = 6;
constexpr int kOnePass = 8;  // up to so many tokens a panel is read once
constexpr int kTokenBlock = 96;

// AHEAD: with software prefetch, for weights that come from memory.
template <int M, int R, bool AHEAD>
void bf16_tile(const Packed& w, int p, const bf16* x, size_t ldx, float* out, size_t ldo, bool add) {
  const bf16* panel[R];
  repeat<R>(HASTEN_EACH(r) { panel[r] = reinterpret_cast<const bf16*>(w.panel(p + r)); });
  __m512 sum[M][R];
  repeat<M>(HASTEN_EACH(m) { repeat<R>(HASTEN_EACH(r) { sum[m][r] = _mm512_setzero_ps(); }); });
  const int pairs = w.padded_cols() / 2;
  constexpr int kStep = 16;
  for (int i = 0; i < pairs; i += kStep) {
    if constexpr (AHEAD)
      repeat<R>(HASTEN_EACH(r) {
        for (int line = 0; line < kStep; line++)
          _mm_prefetch(reinterpret_cast<const char*>(panel[r]) + 4096 + 64 * line, _MM_HINT_T0);
      });
    dot_tile<M, R>(panel, x + 2 * i, ldx, kStep, sum);
    repeat<R>(HASTEN_EACH(r) { panel[r] += 32 * kStep; });
  }
  repeat<M>(HASTEN_EACH(m) {
    repeat<R>(HASTEN_EACH(r) {
      float* o = out + m * ldo + (p + r) * kPanelRows;
      _mm512_storeu_ps(o, add ? _mm512_add_ps(_mm512_loadu_ps(o), sum[m][r]) : sum[m][r]);
    });
  });
}

template <int M, bool AHEAD>
void bf16_panels(const Packed& w, int p0, int p1, const bf16* x, size_t ldx, float* out, size_t ldo, bool add) {
  int p = p0;
  if constexpr (M == 1)
    for (; p + 4 <= p1; p += 4) bf16_tile<M, 4, AHEAD>(w, p, x, ldx, out, ldo, add);
  for (; p + 2 <= p1; p += 2) bf16_tile<M, 2, AHEAD>(w, p, x, ldx, out, ldo, add);
  for (; p < p1; p++) bf16_tile<M, 1, AHEAD>(w, p, x, ldx, out, ldo, add);
}

// M tokens, a run-time number up to MOST.
template <int MOST, bool AHEAD>
void bf16_rest(const Packed& w, int p0, int p1, const bf16* x, size_t ldx, int m, float* out, size_t ldo, bool add) {
  if constexpr (MOST > 1)
    if (m < MOST) return bf16_rest<MOST - 1, AHEAD>(w, p0, p1, x, ldx, m, out, ldo, add);
  if (m == MOST) bf16_panels<MOST, AHEAD>(w, p0, p1, x, ldx, out, ldo, add);
}

inline __mmask16 lanes_left(int left) {
  return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << std::max(left, 0)) - 1);
}

}  // namespace

void linear_bf16(const Packed& w, int p0, int p1, const bf16* x, size_t ldx, int m, float* out, size_t ldo, bool add) {
  if (m <= kOnePass) return bf16_rest<kOnePass, true>(w, p0, p1, x, ldx, m, out, ldo, add);
  for (int t0 = 0; t0 < m; t0 += kTokenBlock)
    for (int p = p0; p < p1; p += 2) {
      const int t1 = std::min(m, t0 + kTokenBlock), p_end = std::min(p1, p + 2);
      int t = t0;
      for (; t + kTile <= t1; t += kTile)
        bf16_panels<kTile, false>(w, p, p_end, x + t * ldx, ldx, out + t * ldo, ldo, add);
      bf16_rest<kTile - 1, false>(w, p, p_end, x + t * ldx, ldx, t1 - t, out + t * ldo, ldo, add);
    }
}

void quantize(const float* x, int n, int padded, int8_t* q, float* scale, int32_t* nsum, int32_t* nsum16) {
  for (int g = 0; g < padded / 32; g++) {
    const int k = 32 * g;
    const __m512 a = _mm512_maskz_loadu_ps(lanes_left(n - k), x + k);
    const __m512 b = _mm512_maskz_loadu_ps(lanes_left(n - k - 16), x + k + 16);
    // As integers, so that NaN is the largest of all.
    const __m512i bits = _mm512_max_epi32(_mm512_castps_si512(_mm512_abs_ps(a)), _mm512_castps_si512(_mm512_abs_ps(b)));
    const float most = std::bit_cast<float>(_mm512_reduce_max_epi32(bits)), factor = to_int8_factor(most);
    const __mmask16 usable = factor > 0 ? 0xffff : 0;
    const __m512 by = _mm512_set1_ps(factor);
    const __m512i qa = _mm512_maskz_cvtps_epi32(usable, _mm512_mul_ps(a, by));
    const __m512i qb = _mm512_maskz_cvtps_epi32(usable, _mm512_mul_ps(b, by));
    const __m256i bytes = _mm256_set_m128i(_mm512_cvtepi32_epi8(qb), _mm512_cvtepi32_epi8(qa));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + k), bytes);
    // Sums of 8 bytes each, of values moved up by 128: one instruction where adding lanes takes some twenty.
    const __m256i up = _mm256_sad_epu8(_mm256_xor_si256(bytes, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
    const __m256i pairs = _mm256_add_epi64(up, _mm256_unpackhi_epi64(up, up));
    nsum16[2 * g] = 16 * 128 - _mm_cvtsi128_si32(_mm256_castsi256_si128(pairs));
    nsum16[2 * g + 1] = 16 * 128 - _mm_cvtsi128_si32(_mm256_extracti128_si256(pairs, 1));
    nsum[g] = nsum16[2 * g] + nsum16[2 * g + 1];
    scale[g] = most / 127.0f;
  }
}

void to_bf16(const float* x, int n, int padded, bf16* out) {
  for (int i = 0; i < padded; i += 16) {
    const __m256bh v = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes_left(n - i), x + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), (__m256i)v);
  }
}

void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
  __m512 squares = _mm512_setzero_ps();
  for (int i = 0; i < n; i += 16) {
    const __m512 v = _mm512_maskz_loadu_ps(lanes_left(n - i), x + i);
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  const float inverse = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / static_cast<float>(n) + eps);
  const __m512 by = _mm512_set1_ps(inverse);
  for (int i = 0; i < n; i += 16) {
    const __mmask16 mask = lanes_left(n - i);
    const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), by);
    _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, weight + i)));
  }
}

void gated(Gate kind, float* gate, const float* up, int n) {
  for (int i = 0; i < n; i += 16) {
    const __mmask16 mask = lanes_left(n - i);
    const __m512 g = _mm512_maskz_loadu_ps(mask, gate + i);
    __m512 arg = g;
    if (kind == Gate::kGeluTanh) {  // gelu_tanh(g) = g * sigmoid(2 sqrt(2/pi) (g + 0.044715 g^3))
      const __m512 cubic = _mm512_mul_ps(_mm512_mul_ps(g, g), _mm512_mul_ps(g, _mm512_set1_ps(0.044715f)));
      arg = _mm512_mul_ps(_mm512_set1_ps(2 * 0.7978845608028654f), _mm512_add_ps(g, cubic));
    }
    const __m512 value = _mm512_mul_ps(gate_by_sigmoid(g, arg), _mm512_maskz_loadu_ps(mask, up + i));
    _mm512_mask_storeu_ps(gate + i, mask, value);
  }
}

void rope(float* head, const float* cos, const float* sin, int half) {
  for (int i = 0; i < half; i += 16) {
    const __mmask16 mask = lanes_left(half - i);
    const __m512 a = _mm512_maskz_loadu_ps(mask, head + i), b = _mm512_maskz_loadu_ps(mask, head + half + i);
    const __m512 c = _mm512_maskz_loadu_ps(mask, cos + i), s = _mm512_maskz_loadu_ps(mask, sin + i);
    _mm512_mask_storeu_ps(head + i, mask, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
    _mm512_mask_storeu_ps(head + half + i, mask, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
  }
}

// Four searches side by side: each compare waits for the one before it, eight cycles long.
int argmax(const float* x, int n) {
  constexpr int kChains = 4;
  const __m512 none = _mm512_set1_ps(-INFINITY);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512 best[kChains];
  __m512i where[kChains];
  repeat<kChains>(HASTEN_EACH(c) { best[c] = none, where[c] = _mm512_add_epi32(lanes, _mm512_set1_epi32(16 * c)); });
  __mmask16 nan = 0;
  for (int i = 0; i < n; i += 16 * kChains) {
    const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32(i));
    repeat<kChains>(HASTEN_EACH(c) {
      const __m512 v = _mm512_mask_loadu_ps(none, lanes_left(n - i - 16 * c), x + i + 16 * c);
      nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
      const __mmask16 more = _mm512_cmp_ps_mask(v, best[c], _CMP_GT_OQ);
      best[c] = _mm512_mask_mov_ps(best[c], more, v);
      where[c] = _mm512_mask_add_epi32(where[c], more, index, _mm512_set1_epi32(16 * c));
    });
  }
  if (nan) return -1;
  __m512 top = best[0];
  repeat<kChains>(HASTEN_EACH(c) { top = _mm512_max_ps(top, best[c]); });
  const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(top));
  int first = std::numeric_limits<int>::max();
  repeat<kChains>(HASTEN_EACH(c) {
    const __mmask16 winners = _mm512_cmp_ps_mask(best[c], most, _CMP_EQ_OQ);
    if (winners) first = std::min(first, _mm512_mask_reduce_min_epi32(winners, where[c]));
  });
  return first;
}

}  // namespace hasten::avx512

namespace hasten {

const Kernels kAvx512Kernels = {
    .name = "avx512",
    .ways = avx512::kIntWays,
    .usual_way = {3, 2, 2, 5, 5, 4},
    .linear_bf16 = avx512::linear_bf16,
    .linear_wide = nullptr,
    .quantize = avx512::quantize,
    .to_bf16 = avx512::to_bf16,
    .int8_to_bf16 = avx2::int8_to_bf16,
    .rms_norm = avx512::rms_norm,
    .gated = avx512::gated,
    .rope = avx512::rope,
    .attend_rows = kFewestRows,
    .attend = avx512::attend,
    .argmax = avx512::argmax,
};

}  // namespace hasten
