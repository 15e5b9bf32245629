// Every kernel in plain loops over the 16 rows of a panel. Compiled as it is, it is the scalar path and the definition
// that tests hold the others to; an instruction set includes it and replaces what it does better.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "isa/kernels.h"

namespace hasten {
namespace {
namespace generic {

// The unsigned value of one weight of a block, by row and input. See layout.h.
template <int BITS>
inline int weight_at(const uint8_t* block, int group, int row, int k) {
  if constexpr (BITS == 8) return block[64 * (k / 4) + 4 * row + k % 4];
  const int byte = 4 * row + k % 4;
  const uint8_t nibbles = block[64 * (k / 8) + byte];
  int u = k % 8 < 4 ? nibbles & 15 : nibbles >> 4;
  if constexpr (BITS == 5) u |= (block[8 * group + 8 * (k / 4) + byte / 8] >> (byte % 8) & 1) << 4;
  if constexpr (BITS == 6) u |= (block[8 * group + 64 * (k / 16) + byte] >> (2 * (k / 4 % 4)) & 3) << 4;
  return u;
}

template <int BITS>
void linear_int_rows(const Packed& w, int p, const QuantRows& x, int t, float* out, bool add) {
  const PackedFormat& format = w.format;
  const int group = format.group, step = std::min(group, kActGroup), zero = format.symmetric ? 1 << (BITS - 1) : 0;
  float sum[kPanelRows] = {};
  const uint8_t* block = w.panel(p);
  for (int k0 = 0; k0 < w.padded_cols(); k0 += group, block += format.block_bytes()) {
    const auto* scale = reinterpret_cast<const fp16*>(block + format.quant_bytes());
    for (int s = 0; s < group; s += step) {
      const int k = k0 + s;
      const int8_t* q = x.q + static_cast<size_t>(t) * x.cols + k;
      const float act = x.scale[static_cast<size_t>(t) * (x.cols / 32) + k / 32];
      const int nsum = step == 16 ? x.nsum16[static_cast<size_t>(t) * (x.cols / 16) + k / 16]
                                  : x.nsum[static_cast<size_t>(t) * (x.cols / 32) + k / 32];
      for (int row = 0; row < kPanelRows; row++) {
        int dot = zero * nsum;
        for (int i = 0; i < step; i++) dot += weight_at<BITS>(block, group, row, s + i) * q[i];
        sum[row] = std::fma(static_cast<float>(dot), fp16_to_float(scale[row]) * act, sum[row]);
        if (!format.symmetric)
          sum[row] = std::fma(fp16_to_float(scale[16 + row]), act * static_cast<float>(-nsum), sum[row]);
      }
    }
  }
  for (int row = 0; row < kPanelRows; row++) out[row] = add ? out[row] + sum[row] : sum[row];
}

inline void linear_int(const Packed& w, int p0, int p1, const QuantRows& x, int m, float* out, size_t ldo, bool add) {
  const auto rows = w.format.bits == 4   ? linear_int_rows<4>
                    : w.format.bits == 5 ? linear_int_rows<5>
                    : w.format.bits == 6 ? linear_int_rows<6>
                                         : linear_int_rows<8>;
  for (int p = p0; p < p1; p++)
    for (int t = 0; t < m; t++) rows(w, p, x, t, out + t * ldo + p * kPanelRows, add);
}

// sum[lane] += w[pair][lane][0..1] . x[pair][0..1]
inline void dot_bf16(const bf16* w, const bf16* x, int pairs, float* sum) {
  for (int i = 0; i < pairs; i++) {
    const float x0 = bf16_to_float(x[2 * i]), x1 = bf16_to_float(x[2 * i + 1]);
    for (int lane = 0; lane < kPanelRows; lane++)
      sum[lane] += bf16_to_float(w[32 * i + 2 * lane]) * x0 + bf16_to_float(w[32 * i + 2 * lane + 1]) * x1;
  }
}

inline void linear_bf16(const Packed& w, int p0, int p1, const bf16* x, size_t ldx, int m, float* out, size_t ldo,
                        bool add) {
  for (int p = p0; p < p1; p++)
    for (int t = 0; t < m; t++) {
      float sum[kPanelRows] = {};
      dot_bf16(reinterpret_cast<const bf16*>(w.panel(p)), x + t * ldx, w.padded_cols() / 2, sum);
      float* o = out + t * ldo + p * kPanelRows;
      for (int row = 0; row < kPanelRows; row++) o[row] = add ? o[row] + sum[row] : sum[row];
    }
}

inline void quantize(const float* x, int n, int padded, int8_t* q, float* scale, int32_t* nsum, int32_t* nsum16) {
  for (int g = 0; g < padded / 32; g++) {
    const int k = 32 * g, here = std::clamp(n - k, 0, 32);
    const float most = largest_magnitude(x + k, here), factor = to_int8_factor(most);
    scale[g] = most / 127.0f;
    for (int half = 0; half < 2; half++) {
      int sum = 0;
      for (int i = 16 * half; i < 16 * half + 16; i++) {
        const int value = i < here && factor > 0 ? static_cast<int>(std::nearbyint(x[k + i] * factor)) : 0;
        q[k + i] = static_cast<int8_t>(value);
        sum += value;
      }
      nsum16[2 * g + half] = -sum;
    }
    nsum[g] = nsum16[2 * g] + nsum16[2 * g + 1];
  }
}

inline void to_bf16(const float* x, int n, int padded, bf16* out) {
  for (int i = 0; i < n; i++) out[i] = float_to_bf16(x[i]);
  std::fill(out + n, out + padded, bf16{0});
}

inline void int8_to_bf16(const int8_t* x, int n, bf16* out) {
  for (int i = 0; i < n; i++) out[i] = float_to_bf16(x[i]);
}

// Sums are kept in 16 lanes, so that every instruction set adds in the same order.
inline void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
  float lanes[16] = {};
  for (int i = 0; i < n; i++) lanes[i % 16] = std::fma(x[i], x[i], lanes[i % 16]);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  const float inverse = 1.0f / std::sqrt(lanes[0] / static_cast<float>(n) + eps);
  for (int i = 0; i < n; i++) out[i] = x[i] * inverse * weight[i];
}

inline void gated(Gate kind, float* gate, const float* up, int n) {
  constexpr float kRoot = 0.7978845608028654f;  // sqrt(2 / pi)
  for (int i = 0; i < n; i++) {
    const float g = gate[i];
    const float arg = kind == Gate::kSilu ? g : 2.0f * kRoot * (g + 0.044715f * g * g * g);
    gate[i] = g / (1.0f + std::exp(-arg)) * up[i];  // gelu_tanh(g) = g * sigmoid(2 * root * (g + 0.044715 g^3))
  }
}

inline void rope(float* head, const float* cos, const float* sin, int half) {
  for (int i = 0; i < half; i++) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cos[i] - b * sin[i];
    head[i + half] = b * cos[i] + a * sin[i];
  }
}

// True if row r of the part may look at the token at `position`.
inline bool visible(const AttendPart& a, int row, int position) {
  return position <= a.position[row] && (a.window == 0 || position > a.position[row] - a.window);
}

// Scores -> weights exp(score - max) in bf16, max and sum. Masked scores weigh exactly 0, so that trailing pages of
// other batches change nothing. max is the largest number; a NaN score is no mask: it makes the sum and the weight NaN.
inline void softmax_part(const AttendPart& a) {
  const int tokens = a.pages * kPageTokens;
  for (int row = 0; row < a.rows; row++) {
    float* s = a.scores + static_cast<size_t>(row) * tokens;
    float most = -std::numeric_limits<float>::infinity();
    for (int t = 0; t < tokens; t++) {
      if (a.k_scale) s[t] *= a.k_scale[t / kPageTokens][t % kPageTokens];
      if (a.softcap > 0) s[t] = a.softcap * std::tanh(s[t] / a.softcap);
      if (!visible(a, row, a.first + t)) s[t] = -std::numeric_limits<float>::infinity();
      most = std::max(most, s[t]);
    }
    float lanes[16] = {};
    bf16* w = a.weights + static_cast<size_t>(row) * tokens;
    for (int t = 0; t < tokens; t++) {
      const bool seen = s[t] != -std::numeric_limits<float>::infinity();
      float e = seen ? std::exp(s[t] - most) : 0.0f;
      lanes[t % 16] += e;
      if (a.v_scale && seen) e *= a.v_scale[t / kPageTokens][t % kPageTokens];
      w[t] = float_to_bf16(e);
    }
    for (int width = 8; width > 0; width /= 2)
      for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    a.max[row] = most;
    a.sum[row] = lanes[0];
  }
}

inline void attend(const AttendPart& a) {
  const int d = a.head_dim, tokens = a.pages * kPageTokens;
  for (int row = 0; row < a.rows; row++)
    for (int t = 0; t < tokens; t += 16) {
      float* s = a.scores + static_cast<size_t>(row) * tokens + t;
      std::fill(s, s + 16, 0.0f);
      dot_bf16(a.k[t / kPageTokens] + (t % kPageTokens) * d, a.q + static_cast<size_t>(row) * d, d / 2, s);
    }
  softmax_part(a);
  std::fill(a.out, a.out + static_cast<size_t>(a.rows) * d, 0.0f);
  for (int row = 0; row < a.rows; row++)
    for (int page = 0; page < a.pages; page++)
      for (int i = 0; i < d; i += 16)
        dot_bf16(a.v[page] + i * kPageTokens, a.weights + static_cast<size_t>(row) * tokens + page * kPageTokens,
                 kPageTokens / 2, a.out + static_cast<size_t>(row) * d + i);
}

inline int argmax(const float* x, int n) {
  int best = 0;
  for (int i = 0; i < n; i++) {
    if (std::isnan(x[i])) return -1;
    if (x[i] > x[best]) best = i;
  }
  return best;
}

}  // namespace generic
}  // namespace
}  // namespace hasten
