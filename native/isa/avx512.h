// The AVX512 kernels by name, for the AMX table, which keeps most of them.
#pragma once

#include "isa/kernels.h"

namespace hasten::avx512 {

extern const IntWay kIntWays[6];
void linear_bf16(const Packed& w, int p0, int p1, const bf16* x, size_t ldx, int m, float* out, size_t ldo, bool add);
void quantize(const float* x, int n, int padded, int8_t* q, float* scale, int32_t* nsum, int32_t* nsum16);
void to_bf16(const float* x, int n, int padded, bf16* out);
void rms_norm(const float* x, const float* weight, int n, float eps, float* out);
void gated(Gate kind, float* gate, const float* up, int n);
void rope(float* head, const float* cos, const float* sin, int half);
void attend(const AttendPart& part);
// max, sum and weights of `count` rows from row `first` on, whose scores and weights stand at `scores` and `weights`.
void softmax_rows(const AttendPart& part, int first, int count, float* scores, bf16* weights);
int argmax(const float* x, int n);

// Unpacks one weight block's unsigned values: per 4 inputs [16 rows][4] u8, 64 bytes each, `stride` bytes apart.
void unpack_block(const PackedFormat& format, const uint8_t* block, uint8_t* out, size_t stride);

}  // namespace hasten::avx512
