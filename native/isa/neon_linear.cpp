// Integer layers for every 64-bit ARM processor: products in 16 bits.
#include "isa/neon_linear.inl"

#include "isa/neon.h"

namespace hasten::neon {

const IntWay kWays[3] = {{"neon stream", 1, 1, kAnyTokens, by_bits<How::kStream>},
                         {"neon stream, prefetch", 1, 1, kAnyTokens, by_bits<How::kStreamAhead>},
                         {"neon unpack", 1, 1, kAnyTokens, by_bits<How::kBlocked>}};

}  // namespace hasten::neon
