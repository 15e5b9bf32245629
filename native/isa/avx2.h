// The AVX2 kernels by name, over the files that hold them.
#pragma once

#include "isa/kernels.h"

namespace hasten::avx2 {

void linear_int(const Packed& w, int p0, int p1, const QuantRows& x, int m, float* out, size_t ldo, bool add);
void attend(const AttendPart& part);

}  // namespace hasten::avx2
