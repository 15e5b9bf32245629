// NEON: bf16 linear layers, the element-wise kernels, and the tables of the three instruction sets of 64-bit ARM.
// Integer layers: neon_linear.inl; attention: neon_attend.cpp.
#include "isa/neon.h"

#include <algorithm>
#include <cmath>

#include "isa/neon_math.inl"

namespace hasten::neon {
namespace {

constexpr int kTile = 4;
constexpr int kTokenBlock = 64;

template <int M, int R>
void bf16_tile(const Packed& w, int p, const bf16* x, size_t ldx, float* out, size_t ldo, bool add) {
  const bf16* panel[R];
  for (int r = 0; r < R; r++) panel[r] = reinterpret_cast<const bf16*>(w.panel(p + r));
  Lanes sum[M][R] = {};
  dot_tile<M, R>(panel, x, ldx, w.padded_cols() / 2, sum);
  repeat<M>(HASTEN_EACH(m) {
    repeat<R>(HASTEN_EACH(r) {
      repeat<4>(HASTEN_EACH(h) {
        float* o = out + m * ldo + (p + r) * kPanelRows + 4 * h;
        vst1q_f32(o, add ? vaddq_f32(vld1q_f32(o), sum[m][r][h]) : sum[m][r][h]);
      });
    });
  });
}

#include "isa/bf16_panels.inl"

void quantize(const float* x, int n, int padded, int8_t* q, float* scale, int32_t* nsum, int32_t* nsum16) {
  for (int g = 0; g < padded / 32; g++) {
    float32x4_t v[8];
    uint32x4_t bits = vdupq_n_u32(0);  // as integers, so that NaN is the largest of all
    for (int i = 0; i < 8; i++) {
      const int k = 32 * g + 4 * i;
      v[i] = k < n ? load_left(x + k, n - k) : vdupq_n_f32(0);
      bits = vmaxq_u32(bits, vreinterpretq_u32_f32(vabsq_f32(v[i])));
    }
    const float most = std::bit_cast<float>(vmaxvq_u32(bits)), factor = to_int8_factor(most);
    for (int half = 0; half < 2; half++) {
      int32x4_t whole[4];
      for (int i = 0; i < 4; i++)
        whole[i] = factor > 0 ? vcvtnq_s32_f32(vmulq_n_f32(v[4 * half + i], factor)) : vdupq_n_s32(0);
      const int16x8_t low = vcombine_s16(vmovn_s32(whole[0]), vmovn_s32(whole[1]));
      const int16x8_t high = vcombine_s16(vmovn_s32(whole[2]), vmovn_s32(whole[3]));
      vst1q_s8(q + 32 * g + 16 * half, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
      nsum16[2 * g + half] = -vaddvq_s16(vaddq_s16(low, high));
    }
    nsum[g] = nsum16[2 * g] + nsum16[2 * g + 1];
    scale[g] = most / 127.0f;
  }
}

void to_bf16_row(const float* x, int n, int padded, bf16* out) {
  for (int i = 0; i < padded; i += 4) vst1_u16(out + i, to_bf16(i < n ? load_left(x + i, n - i) : vdupq_n_f32(0)));
}

void int8_to_bf16(const int8_t* x, int n, bf16* out) {
  for (int i = 0; i < n; i += 8) {
    const int16x8_t eight = vmovl_s8(vld1_s8(x + i));
    const float32x4_t low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(eight)));
    const float32x4_t high = vcvtq_f32_s32(vmovl_high_s16(eight));
    vst1_u16(out + i, vshrn_n_u32(vreinterpretq_u32_f32(low), 16));
    vst1_u16(out + i + 4, vshrn_n_u32(vreinterpretq_u32_f32(high), 16));
  }
}

void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
  Lanes squares = {};
  for (int i = 0; i < n; i += 16)
    for (int h = 0; h < 4; h++) {
      const int left = n - i - 4 * h;
      const float32x4_t v = left > 0 ? load_left(x + i + 4 * h, left) : vdupq_n_f32(0);
      squares[h] = vfmaq_f32(squares[h], v, v);
    }
  const float by = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(n) + eps);
  for (int i = 0; i < n; i += 4)
    store_left(out + i, n - i, vmulq_f32(vmulq_n_f32(load_left(x + i, n - i), by), load_left(weight + i, n - i)));
}

void gated(Gate kind, float* gate, const float* up, int n) {
  for (int i = 0; i < n; i += 4) {
    const float32x4_t g = load_left(gate + i, n - i);
    float32x4_t arg = g;
    if (kind == Gate::kGeluTanh) {  // gelu_tanh(g) = g * sigmoid(2 sqrt(2/pi) (g + 0.044715 g^3))
      const float32x4_t cubic = vmulq_f32(vmulq_f32(g, g), vmulq_n_f32(g, 0.044715f));
      arg = vmulq_n_f32(vaddq_f32(g, cubic), 2 * 0.7978845608028654f);
    }
    store_left(gate + i, n - i, vmulq_f32(gate_by_sigmoid(g, arg), load_left(up + i, n - i)));
  }
}

void rope(float* head, const float* cos, const float* sin, int half) {
  for (int i = 0; i < half; i += 4) {
    const int left = half - i;
    const float32x4_t a = load_left(head + i, left), b = load_left(head + half + i, left);
    const float32x4_t c = load_left(cos + i, left), s = load_left(sin + i, left);
    store_left(head + i, left, vfmaq_f32(vnegq_f32(vmulq_f32(b, s)), a, c));
    store_left(head + half + i, left, vfmaq_f32(vmulq_f32(a, s), b, c));
  }
}

int argmax(const float* x, int n) {
  const float32x4_t none = vdupq_n_f32(-INFINITY);
  const uint32x4_t lane = {0, 1, 2, 3};
  float32x4_t best = none;
  uint32x4_t where = vdupq_n_u32(0), numbers = vdupq_n_u32(~0u);
  for (int i = 0; i < n; i += 4) {
    const uint32x4_t index = vaddq_u32(lane, vdupq_n_u32(static_cast<uint32_t>(i)));
    float32x4_t v = load_left(x + i, n - i);
    if (n - i < 4) v = vbslq_f32(vcltq_u32(index, vdupq_n_u32(static_cast<uint32_t>(n))), v, none);
    numbers = vandq_u32(numbers, vceqq_f32(v, v));
    const uint32x4_t more = vcgtq_f32(v, best);
    best = vbslq_f32(more, v, best);
    where = vbslq_u32(more, index, where);
  }
  if (vminvq_u32(numbers) == 0) return -1;
  const uint32x4_t winners = vceqq_f32(best, vdupq_n_f32(vmaxvq_f32(best)));
  return static_cast<int>(vminvq_u32(vbslq_u32(winners, where, vdupq_n_u32(~0u))));
}

constexpr Kernels table(const char* name, std::span<const IntWay> ways) {
  return {
      .name = name,
      .ways = ways,
      .usual_way = {0, 0, 0, 2, 2, 2},
      .linear_bf16 = linear_bf16,
      .linear_wide = nullptr,
      .quantize = quantize,
      .to_bf16 = to_bf16_row,
      .int8_to_bf16 = int8_to_bf16,
      .rms_norm = rms_norm,
      .gated = gated,
      .rope = rope,
      .attend_rows = kFewestRows,
      .attend = attend,
      .argmax = argmax,
  };
}

}  // namespace
}  // namespace hasten::neon

namespace hasten {

constinit const Kernels kNeonKernels = neon::table("neon", neon::kWays);
constinit const Kernels kDotprodKernels = neon::table("dotprod", neon::kDotprodWays);
constinit const Kernels kI8mmKernels = neon::table("i8mm", neon::kI8mmWays);

}  // namespace hasten
