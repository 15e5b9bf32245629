// Vector exp and tanh for NEON, loads of a row's end, and tiles of bf16 dot products.
#include <arm_neon.h>

#include <cstring>

#include "isa/repeat.h"
#include "layout.h"
#include "numeric.h"

namespace hasten::neon {
namespace {

// Four values of which only the first `left` are read; the rest are 0.
inline float32x4_t load_left(const float* x, int left) {
  if (left >= 4) return vld1q_f32(x);
  float four[4] = {};
  for (int i = 0; i < left; i++) four[i] = x[i];
  return vld1q_f32(four);
}
inline void store_left(float* x, int left, float32x4_t v) {
  if (left >= 4) return vst1q_f32(x, v);
  float four[4];
  vst1q_f32(four, v);
  for (int i = 0; i < left; i++) x[i] = four[i];
}

inline float32x4_t where(uint32x4_t mask, float32x4_t v) {
  return vreinterpretq_f32_u32(vandq_u32(mask, vreinterpretq_u32_f32(v)));
}

// e^x by range reduction to [-ln2/2, ln2/2] and a polynomial of degree 6 (relative error below 1e-7), for x up to 88;
// below -87.3 it is 0; NaN stays NaN. The same steps as the AVX2 kernel's.
inline float32x4_t exp(float32x4_t x) {
  const float32x4_t lowest = vdupq_n_f32(-87.3f), clamped = vmaxq_f32(x, lowest);
  const float32x4_t n = vrndnq_f32(vmulq_n_f32(clamped, 1.44269504088896341f));
  float32x4_t r = vfmsq_f32(clamped, n, vdupq_n_f32(0.693145751953125f));
  r = vfmsq_f32(r, n, vdupq_n_f32(1.428606765330187e-06f));
  float32x4_t p = vdupq_n_f32(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = vfmaq_f32(vdupq_n_f32(c), p, r);
  const int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
  return where(vmvnq_u32(vcleq_f32(x, lowest)), vmulq_f32(p, vreinterpretq_f32_s32(power)));
}

// 2^y for y <= 0 by the polynomial of numeric.h; 0 below kLowestPower, NaN stays NaN.
inline float32x4_t power_of_two(float32x4_t y) {
  const float32x4_t lowest = vdupq_n_f32(kLowestPower), x = vmaxq_f32(y, lowest);
  // In the sum with 1.5 * 2^23 + 127 the fraction is rounded off, and the low bits are the exponent of 2^n.
  const float32x4_t magic = vdupq_n_f32(0x1.8p23f + 127.0f), shifted = vaddq_f32(x, magic);
  const float32x4_t f = vsubq_f32(x, vsubq_f32(shifted, magic));
  float32x4_t p = vdupq_n_f32(kPowerTerms[0]);
  for (int i = 1; i < 7; i++) p = vfmaq_f32(vdupq_n_f32(kPowerTerms[i]), p, f);
  const int32x4_t power = vshlq_n_s32(vreinterpretq_s32_f32(shifted), 23);
  return where(vmvnq_u32(vcltq_f32(y, lowest)), vmulq_f32(p, vreinterpretq_f32_s32(power)));
}

// x / (1 + e^-y)
inline float32x4_t gate_by_sigmoid(float32x4_t x, float32x4_t y) {
  const float32x4_t minus = vminq_f32(vdupq_n_f32(88.0f), vnegq_f32(y));  // NaN stays
  return vdivq_f32(x, vaddq_f32(vdupq_n_f32(1.0f), exp(minus)));
}

inline float32x4_t tanh(float32x4_t x) {  // 1 - 2 / (1 + e^2x)
  const float32x4_t one = vdupq_n_f32(1.0f), e = exp(vminq_f32(vdupq_n_f32(80.0f), vaddq_f32(x, x)));
  return vsubq_f32(one, vdivq_f32(vdupq_n_f32(2.0f), vaddq_f32(one, e)));
}

// Four floats to bf16, to nearest even; NaN stays NaN.
inline uint16x4_t to_bf16(float32x4_t v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v), high = vshrq_n_u32(bits, 16);
  const uint32x4_t odd = vandq_u32(high, vdupq_n_u32(1));
  const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
  return vmovn_u32(vbslq_u32(vceqq_f32(v, v), rounded, vorrq_u32(high, vdupq_n_u32(0x40))));
}

// The first and the second of each pair of bf16, as floats.
inline float32x4_t first_of(uint32x4_t pairs) { return vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16)); }
inline float32x4_t second_of(uint32x4_t pairs) {
  return vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000)));
}

// The four quarters of 16 lanes.
using Lanes = float32x4_t[4];

// sum[m][r][quarter] += x[m] . w[r] over `pairs` pairs of inputs; w[r] is [pairs][16][2]. One chain of additions an
// output, in the order of the inputs, whatever M and R.
template <int M, int R>
inline void dot_tile(const bf16* const* w, const bf16* x, size_t ldx, int pairs, Lanes (&sum)[M][R]) {
  for (int i = 0; i < pairs; i++)
    repeat<R>(HASTEN_EACH(r) {
      uint32x4_t weight[4];
      repeat<4>(HASTEN_EACH(h) { weight[h] = vreinterpretq_u32_u16(vld1q_u16(w[r] + 32 * i + 8 * h)); });
      repeat<M>(HASTEN_EACH(m) {
        const float x0 = bf16_to_float(x[m * ldx + 2 * i]), x1 = bf16_to_float(x[m * ldx + 2 * i + 1]);
        repeat<4>(HASTEN_EACH(h) {
          sum[m][r][h] = vfmaq_n_f32(vfmaq_n_f32(sum[m][r][h], first_of(weight[h]), x0), second_of(weight[h]), x1);
        });
      });
    });
}

// The sum of 16 lanes in the order of the other instruction sets: halves first.
inline float sum_of(const Lanes& lanes) {
  const float32x4_t four = vaddq_f32(vaddq_f32(lanes[0], lanes[2]), vaddq_f32(lanes[1], lanes[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

}  // namespace
}  // namespace hasten::neon
