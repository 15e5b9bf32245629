// The kernels of 64-bit ARM by name, over the files that hold them. Three instruction sets share all but the integer
// layers: "neon", which every such processor has; "dotprod" (SDOT); "i8mm" (SDOT and SMMLA).
#pragma once

#include "isa/kernels.h"
#include "probe.h"

namespace hasten::neon {

extern const IntWay kWays[3], kDotprodWays[3], kI8mmWays[3];
extern const Peak kDotprodInt8, kI8mmInt8;  // loops of int8 products
void attend(const AttendPart& part);

}  // namespace hasten::neon
