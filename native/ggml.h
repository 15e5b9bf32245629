// The block formats of GGUF files, read, and the k-quants written. Source: ggml's ggml-common.h and ggml-quants.c (the
// published formats).
//
// S*_* and A*_* are our own, for integers of quantised checkpoints (models/quantized.py) and of calibration:
// BITS_GROUP, a block is one group: an fp32 scale, in A an fp32 minimum, then one byte u a value. S is symmetric,
// scale * (u - 2^(bits-1)), A is scale * u + minimum.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "layout.h"

namespace hasten {

enum class Dtype {
  F32,
  F16,
  BF16,
  Q8_0,
  Q4_0,
  Q4_1,
  Q5_0,
  Q5_1,
  Q2_K,
  Q3_K,
  Q4_K,
  Q5_K,
  Q6_K,
  IQ4_NL,
  IQ4_XS,
  IQ3_XXS,
  IQ3_S,
  IQ2_XXS,
  IQ2_XS,
  IQ2_S,
  IQ1_S,
  IQ1_M,
  TQ1_0,
  TQ2_0,
  MXFP4,
  S4_32,
  S4_64,
  S4_128,
  S5_32,
  S5_64,
  S5_128,
  S6_32,
  S6_64,
  S6_128,
  S8_32,
  S8_64,
  S8_128,
  A4_32,
  A4_64,
  A4_128,
  A5_32,
  A5_64,
  A5_128,
  A6_32,
  A6_64,
  A6_128,
  A8_32,
  A8_64,
  A8_128
};

struct DtypeInfo {
  Dtype dtype;
  std::string_view name;  // as GGUF and safetensors spell it
  int block;              // values a block
  int bytes;              // bytes a block
  PackedFormat format;    // the cheapest packed layout that holds the values
  bool exact;             // whether it holds them without rounding
};

// nullptr where the name is none of ours.
const DtypeInfo* find_dtype(std::string_view name);
const DtypeInfo& info_of(Dtype dtype);

inline size_t bytes_of(const DtypeInfo& info, size_t n) { return n / info.block * info.bytes; }

// n values from src; n is a multiple of the dtype's block. Values are those of ggml's own dequantisation, to the bit.
void dequantize(Dtype dtype, const uint8_t* src, size_t n, float* out);

// The same values taken apart: u[n] and a scale (and, if the format is asymmetric, a minimum) for each format.group
// values, such that a value is scale * (u - 2^(bits-1)), or scale * u + minimum. Not for F32, F16 and BF16.
void decode_groups(Dtype dtype, const uint8_t* src, size_t n, uint8_t* u, float* scale, float* minimum);

// Whether quantize writes a dtype: Q4_K, Q5_K and Q6_K.
bool is_written(Dtype dtype);

// n finite values, a multiple of the block, rounded into blocks of a dtype that is_written: of a few tries for each
// group the one with the least squared error. The same bytes on every machine.
void quantize(Dtype dtype, const float* x, size_t n, uint8_t* out);

}  // namespace hasten
