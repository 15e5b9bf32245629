// 64-bit ARM. 32 registers: 16 hold sums, which covers a latency of 4 cycles on four ports. The loops of SDOT and SMMLA
// are in the files that are compiled for them.
#include <arm_neon.h>

#include "isa/neon.h"
#include "isa/probe_loop.inl"
#include "probe.h"

namespace hasten {
namespace {

constexpr int kSums = 16;

// Bytes to products of 16 bits, pairs of these, and pairs of those added to 32.
void int8_peak(int64_t rounds) {
  int8x16_t a = vdupq_n_s8(1), b = vdupq_n_s8(2);
  opaque(b);
  repeat(rounds, Sixteen{}, vdupq_n_s32(0), [&](int32x4_t& sum) {
    opaque(a);  // else the product is computed once
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
    sum = vpadalq_s16(sum, vpaddq_s16(low, vmull_high_s8(a, b)));
  });
}

// A pair of bf16 weights becomes two floats, by a shift and by a mask, each multiplied and added.
void bf16_peak(int64_t rounds) {
  float32x4_t x = vdupq_n_f32(0.5f);
  uint32x4_t pair = vdupq_n_u32(0x3f803f80), high = vdupq_n_u32(0xffff0000);
  opaque(x), opaque(high);
  repeat(rounds, Sixteen{}, vdupq_n_f32(0), [&](float32x4_t& sum) {
    opaque(pair);
    sum = vfmaq_f32(sum, vreinterpretq_f32_u32(vshlq_n_u32(pair, 16)), x);
    sum = vfmaq_f32(sum, vreinterpretq_f32_u32(vandq_u32(pair, high)), x);
  });
}

void fp32_peak(int64_t rounds) {
  float32x4_t a = vdupq_n_f32(1.0f), b = vdupq_n_f32(0.5f);
  opaque(a), opaque(b);
  repeat(rounds, Sixteen{}, vdupq_n_f32(0), [&](float32x4_t& sum) { sum = vfmaq_f32(sum, a, b); });
}

ProbeKernels all(const char* name, Peak int8) {
  return {name, read_by<uint32x4_t>, int8, {bf16_peak, 2.0 * 8 * kSums}, {fp32_peak, 2.0 * 4 * kSums}};
}

}  // namespace

const ProbeKernels kProbeNeon = all("neon", {int8_peak, 2.0 * 16 * kSums});
const ProbeKernels kProbeDotprod = all("dotprod", neon::kDotprodInt8);
const ProbeKernels kProbeI8mm = all("i8mm", neon::kI8mmInt8);

}  // namespace hasten
