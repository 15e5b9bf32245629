// AVX2: bf16 linear layers and the element-wise kernels. Integer layers: avx2_linear.cpp; attention: avx2_attend.cpp.
#include "isa/avx2.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "isa/avx2_math.inl"
#include "numeric.h"

namespace hasten::avx2 {
namespace {

constexpr int kTile = 4;
constexpr int kTokenBlock = 64;

template <int M, int R>
void bf16_tile(const Packed& w, int p, const bf16* x, size_t ldx, float* out, size_t ldo, bool add) {
  const bf16* panel[R];
  for (int r = 0; r < R; r++) panel[r] = reinterpret_cast<const bf16*>(w.panel(p + r));
  __m256 sum[M][R][2] = {};
  dot_tile<M, R>(panel, x, ldx, w.padded_cols() / 2, sum);
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++)
      for (int h = 0; h < 2; h++) {
        float* o = out + m * ldo + (p + r) * kPanelRows + 8 * h;
        _mm256_storeu_ps(o, add ? _mm256_add_ps(_mm256_loadu_ps(o), sum[m][r][h]) : sum[m][r][h]);
      }
}

#include "isa/bf16_panels.inl"

// Lanes before `left` are set.
inline __m256i lanes_left(int left) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(left), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256 load_left(const float* x, int left) {
  return left >= 8 ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, lanes_left(left));
}
inline void store_left(float* x, int left, __m256 v) {
  if (left >= 8)
    _mm256_storeu_ps(x, v);
  else
    _mm256_maskstore_ps(x, lanes_left(left), v);
}
inline __m256 magnitude(__m256 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }

inline int sum_of_integers(__m256i v) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

inline int largest_integer(__m256i v) {
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

// 32 integers within int8, in order.
inline __m256i to_bytes(const __m256i (&v)[4]) {
  const __m256i ab = _mm256_packs_epi32(v[0], v[1]), cd = _mm256_packs_epi32(v[2], v[3]);
  return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

void quantize(const float* x, int n, int padded, int8_t* q, float* scale, int32_t* nsum, int32_t* nsum16) {
  for (int g = 0; g < padded / 32; g++) {
    __m256 v[4];
    __m256i bits = _mm256_setzero_si256();  // as integers, so that NaN is the largest of all
    for (int i = 0; i < 4; i++) {
      const int k = 32 * g + 8 * i;
      v[i] = k < n ? load_left(x + k, n - k) : _mm256_setzero_ps();
      bits = _mm256_max_epi32(bits, _mm256_castps_si256(magnitude(v[i])));
    }
    const float most = std::bit_cast<float>(largest_integer(bits)), factor = to_int8_factor(most);
    __m256i rounded[4];
    for (int i = 0; i < 4; i++)
      rounded[i] =
          factor > 0 ? _mm256_cvtps_epi32(_mm256_mul_ps(v[i], _mm256_set1_ps(factor))) : _mm256_setzero_si256();
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + 32 * g), to_bytes(rounded));
    for (int half = 0; half < 2; half++)
      nsum16[2 * g + half] = -sum_of_integers(_mm256_add_epi32(rounded[2 * half], rounded[2 * half + 1]));
    nsum[g] = nsum16[2 * g] + nsum16[2 * g + 1];
    scale[g] = most / 127.0f;
  }
}

void to_bf16_row(const float* x, int n, int padded, bf16* out) {
  for (int i = 0; i < padded; i += 8) {
    const __m256 v = i < n ? load_left(x + i, n - i) : _mm256_setzero_ps();
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), to_bf16(v));
  }
}

void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
  __m256 squares[2] = {};
  for (int i = 0; i < n; i += 8) {
    const __m256 v = load_left(x + i, n - i);
    squares[i / 8 % 2] = _mm256_fmadd_ps(v, v, squares[i / 8 % 2]);
  }
  const float mean = sum_of(squares[0], squares[1]) / static_cast<float>(n);
  const __m256 by = _mm256_set1_ps(1.0f / std::sqrt(mean + eps));
  for (int i = 0; i < n; i += 8) {
    const __m256 v = _mm256_mul_ps(load_left(x + i, n - i), by);
    store_left(out + i, n - i, _mm256_mul_ps(v, load_left(weight + i, n - i)));
  }
}

void gated(Gate kind, float* gate, const float* up, int n) {
  for (int i = 0; i < n; i += 8) {
    const __m256 g = load_left(gate + i, n - i);
    __m256 arg = g;
    if (kind == Gate::kGeluTanh) {  // gelu_tanh(g) = g * sigmoid(2 sqrt(2/pi) (g + 0.044715 g^3))
      const __m256 cubic = _mm256_mul_ps(_mm256_mul_ps(g, g), _mm256_mul_ps(g, _mm256_set1_ps(0.044715f)));
      arg = _mm256_mul_ps(_mm256_set1_ps(2 * 0.7978845608028654f), _mm256_add_ps(g, cubic));
    }
    store_left(gate + i, n - i, _mm256_mul_ps(gate_by_sigmoid(g, arg), load_left(up + i, n - i)));
  }
}

void rope(float* head, const float* cos, const float* sin, int half) {
  for (int i = 0; i < half; i += 8) {
    const int left = half - i;
    const __m256 a = load_left(head + i, left), b = load_left(head + half + i, left);
    const __m256 c = load_left(cos + i, left), s = load_left(sin + i, left);
    store_left(head + i, left, _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)));
    store_left(head + half + i, left, _mm256_fmadd_ps(b, c, _mm256_mul_ps(a, s)));
  }
}

int argmax(const float* x, int n) {
  const __m256 none = _mm256_set1_ps(-INFINITY);
  __m256 best = none, nan = _mm256_setzero_ps();
  __m256i where = _mm256_setzero_si256(), index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int i = 0; i < n; i += 8) {
    __m256 v = load_left(x + i, n - i);
    if (n - i < 8) v = _mm256_blendv_ps(none, v, _mm256_castsi256_ps(lanes_left(n - i)));
    nan = _mm256_or_ps(nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256 more = _mm256_cmp_ps(v, best, _CMP_GT_OQ);
    best = _mm256_blendv_ps(best, v, more);
    where = _mm256_blendv_epi8(where, index, _mm256_castps_si256(more));
    index = _mm256_add_epi32(index, _mm256_set1_epi32(8));
  }
  if (_mm256_movemask_ps(nan)) return -1;
  const __m256 winners = _mm256_cmp_ps(best, _mm256_set1_ps(largest_of(best)), _CMP_EQ_OQ);
  // Minus the index where the lane wins, the lowest integer elsewhere.
  const __m256i minus = _mm256_sub_epi32(_mm256_setzero_si256(), where);
  const __m256i lowest = _mm256_set1_epi32(INT32_MIN);
  return -largest_integer(_mm256_blendv_epi8(lowest, minus, _mm256_castps_si256(winners)));
}

}  // namespace

void int8_to_bf16(const int8_t* x, int n, bf16* out) {
  for (int i = 0; i < n; i += 16) {
    __m256i half[2];
    for (int h = 0; h < 2; h++) {
      const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x + i + 8 * h));
      half[h] = _mm256_srli_epi32(_mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight))), 16);
    }
    const __m256i mixed = _mm256_packus_epi32(half[0], half[1]);  // 4 of each half, twice
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_permute4x64_epi64(mixed, 0xd8));
  }
}

}  // namespace hasten::avx2

namespace hasten {

const Kernels kAvx2Kernels = {
    .name = "avx2",
    .ways = avx2::kIntWays,
    .usual_way = {1, 1, 1, 3, 3, 2},
    .linear_bf16 = avx2::linear_bf16,
    .linear_wide = nullptr,
    .quantize = avx2::quantize,
    .to_bf16 = avx2::to_bf16_row,
    .int8_to_bf16 = avx2::int8_to_bf16,
    .rms_norm = avx2::rms_norm,
    .gated = avx2::gated,
    .rope = avx2::rope,
    .attend_rows = 256,
    .attend = avx2::attend,
    .argmax = avx2::argmax,
};

}  // namespace hasten
