// The AVX2 kernels by name, over the files that hold them.
#pragma once

#include "isa/kernels.h"

namespace hasten::avx2 {

extern const IntWay kIntWays[4];
void attend(const AttendPart& part);
void int8_to_bf16(const int8_t* x, int n, bf16* out);

}  // namespace hasten::avx2
