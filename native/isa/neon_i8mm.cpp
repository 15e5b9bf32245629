// The same for processors that have SMMLA too (Armv8.6, and Neoverse V1): many tokens take it, few take SDOT.
#include "isa/neon.h"
#include "isa/neon_linear.inl"
#include "isa/probe_loop.inl"

namespace hasten::neon {
namespace {

void int8_peak(int64_t rounds) {
  int8x16_t a = vdupq_n_s8(1), b = vdupq_n_s8(2);
  opaque(a), opaque(b);
  repeat(rounds, hasten::Sixteen{}, vdupq_n_s32(0), [&](int32x4_t& sum) { sum = vmmlaq_s32(sum, a, b); });
}

}  // namespace

const IntWay kI8mmWays[3] = {{"i8mm stream", 1, 1, kAnyTokens, by_bits<How::kStream>},
                             {"i8mm stream, prefetch", 1, 1, kAnyTokens, by_bits<How::kStreamAhead>},
                             {"i8mm unpack", 1, 1, kAnyTokens, by_bits<How::kBlocked>}};
constinit const Peak kI8mmInt8 = {int8_peak, 2.0 * 32 * 16};

}  // namespace hasten::neon
