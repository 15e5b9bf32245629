// The AVX2 kernels by name, over the files that hold them.
#pragma once

#include "isa/kernels.h"

namespace hasten::avx2 {

extern const IntWay kIntWays[3];
void attend(const AttendPart& part);

}  // namespace hasten::avx2
