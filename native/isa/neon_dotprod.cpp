// Integer layers, and the loop that measures their ceiling, for processors with SDOT (most since 2018).
#include "isa/neon.h"
#include "isa/neon_linear.inl"
#include "isa/probe_loop.inl"

namespace hasten::neon {
namespace {

void int8_peak(int64_t rounds) {
  int8x16_t a = vdupq_n_s8(1), b = vdupq_n_s8(2);
  opaque(a), opaque(b);
  repeat(rounds, hasten::Sixteen{}, vdupq_n_s32(0), [&](int32x4_t& sum) { sum = vdotq_s32(sum, a, b); });
}

}  // namespace

const IntWay kDotprodWays[3] = {{"dotprod stream", 1, 1, kAnyTokens, by_bits<How::kStream>},
                                {"dotprod stream, prefetch", 1, 1, kAnyTokens, by_bits<How::kStreamAhead>},
                                {"dotprod unpack", 1, 1, kAnyTokens, by_bits<How::kBlocked>}};
constinit const Peak kDotprodInt8 = {int8_peak, 2.0 * 16 * 16};

}  // namespace hasten::neon
