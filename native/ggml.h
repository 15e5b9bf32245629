// The block formats of GGUF files, read. Source: ggml's ggml-common.h and ggml-quants.c (the published formats).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "layout.h"

namespace hasten {

enum class Dtype { F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL };

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

}  // namespace hasten
