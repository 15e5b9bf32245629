#include "ggml.h"

#include <cstring>

#include "ggml_iq.h"
#include "lanes.h"
#include "numeric.h"

namespace hasten {

namespace {

constexpr DtypeInfo kDtypes[] = {
    {Dtype::F32, "F32", 1, 4, {16, 32, true}, false},
    {Dtype::F16, "F16", 1, 2, {16, 32, true}, false},
    {Dtype::BF16, "BF16", 1, 2, {16, 32, true}, true},
    {Dtype::Q8_0, "Q8_0", 32, 34, {8, 32, true}, true},
    {Dtype::Q4_0, "Q4_0", 32, 18, {4, 32, true}, true},
    {Dtype::Q4_1, "Q4_1", 32, 20, {4, 32, false}, true},
    {Dtype::Q5_0, "Q5_0", 32, 22, {5, 32, true}, true},
    {Dtype::Q5_1, "Q5_1", 32, 24, {5, 32, false}, true},
    {Dtype::Q2_K, "Q2_K", 256, 84, {4, 16, false}, false},
    {Dtype::Q3_K, "Q3_K", 256, 110, {4, 16, true}, false},
    {Dtype::Q4_K, "Q4_K", 256, 144, {4, 32, false}, false},
    {Dtype::Q5_K, "Q5_K", 256, 176, {5, 32, false}, false},
    {Dtype::Q6_K, "Q6_K", 256, 210, {6, 16, true}, false},
    {Dtype::IQ4_NL, "IQ4_NL", 32, 18, {8, 32, true}, true},
    {Dtype::IQ4_XS, "IQ4_XS", 256, 136, {8, 32, true}, false},
    {Dtype::IQ3_XXS, "IQ3_XXS", 256, 98, {8, 32, true}, false},
    {Dtype::IQ3_S, "IQ3_S", 256, 110, {5, 32, true}, false},
    {Dtype::IQ2_XXS, "IQ2_XXS", 256, 66, {8, 32, true}, false},
    {Dtype::IQ2_XS, "IQ2_XS", 256, 74, {8, 16, true}, false},
    {Dtype::IQ2_S, "IQ2_S", 256, 82, {8, 16, true}, false},
    {Dtype::IQ1_S, "IQ1_S", 256, 50, {5, 32, true}, false},
    {Dtype::IQ1_M, "IQ1_M", 256, 56, {5, 16, true}, false},
    {Dtype::TQ1_0, "TQ1_0", 256, 54, {4, 128, true}, true},
    {Dtype::TQ2_0, "TQ2_0", 256, 66, {4, 128, true}, true},
    {Dtype::MXFP4, "MXFP4", 32, 17, {5, 32, true}, false},
    {Dtype::S4_32, "S4_32", 32, 36, {4, 32, true}, false},
    {Dtype::S4_64, "S4_64", 64, 68, {4, 64, true}, false},
    {Dtype::S4_128, "S4_128", 128, 132, {4, 128, true}, false},
    {Dtype::S5_32, "S5_32", 32, 36, {5, 32, true}, false},
    {Dtype::S5_64, "S5_64", 64, 68, {5, 64, true}, false},
    {Dtype::S5_128, "S5_128", 128, 132, {5, 128, true}, false},
    {Dtype::S6_32, "S6_32", 32, 36, {6, 32, true}, false},
    {Dtype::S6_64, "S6_64", 64, 68, {6, 64, true}, false},
    {Dtype::S6_128, "S6_128", 128, 132, {6, 128, true}, false},
    {Dtype::S8_32, "S8_32", 32, 36, {8, 32, true}, false},
    {Dtype::S8_64, "S8_64", 64, 68, {8, 64, true}, false},
    {Dtype::S8_128, "S8_128", 128, 132, {8, 128, true}, false},
    {Dtype::A4_32, "A4_32", 32, 40, {4, 32, false}, false},
    {Dtype::A4_64, "A4_64", 64, 72, {4, 64, false}, false},
    {Dtype::A4_128, "A4_128", 128, 136, {4, 128, false}, false},
    {Dtype::A5_32, "A5_32", 32, 40, {5, 32, false}, false},
    {Dtype::A5_64, "A5_64", 64, 72, {5, 64, false}, false},
    {Dtype::A5_128, "A5_128", 128, 136, {5, 128, false}, false},
    {Dtype::A6_32, "A6_32", 32, 40, {6, 32, false}, false},
    {Dtype::A6_64, "A6_64", 64, 72, {6, 64, false}, false},
    {Dtype::A6_128, "A6_128", 128, 136, {6, 128, false}, false},
    {Dtype::A8_32, "A8_32", 32, 40, {8, 32, false}, false},
    {Dtype::A8_64, "A8_64", 64, 72, {8, 64, false}, false},
    {Dtype::A8_128, "A8_128", 128, 136, {8, 128, false}, false},
};

// Every product of a scale (at most 18 significant bits) with a quantised value (at most 6, or 17 bits with 7), or of
// an fp16 with a byte, is exact in a float, so it does not matter whether the compiler fuses it with the subtraction
// that follows. (Ours may hold a true fp32 scale; then a machine with FMA may differ in the last bit of an asymmetric
// value.)

HASTEN_CLONES void read_f16(const uint8_t* src, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) {
    uint16_t h;
    std::memcpy(&h, src + 2 * i, 2);
    const uint32_t magnitude = (h & 0x7fffu) << 13;
    float value;
    std::memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;  // exact, subnormals too
    uint32_t u;
    std::memcpy(&u, &value, 4);
    u = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : u;
    u |= (h & 0x8000u) << 16;
    std::memcpy(out + i, &u, 4);
  }
}

HASTEN_CLONES void read_bf16(const uint8_t* src, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) {
    uint16_t h;
    std::memcpy(&h, src + 2 * i, 2);
    const uint32_t u = uint32_t{h} << 16;
    std::memcpy(out + i, &u, 4);
  }
}

// The 6-bit scales and minimums of Q4_K and Q5_K, out of their 12 bytes.
HASTEN_INLINE void k_scales(const uint8_t* packed, uint8_t scale[8], uint8_t minimum[8]) {
  for (int i = 0; i < 4; ++i) {
    scale[i] = packed[i] & 63;
    minimum[i] = packed[i + 4] & 63;
    scale[i + 4] = (packed[i + 8] & 15) | packed[i] >> 6 << 4;
    minimum[i + 4] = packed[i + 8] >> 4 | packed[i + 4] >> 6 << 4;
  }
}

// The 6-bit scales of Q3_K, out of their 12 bytes.
HASTEN_INLINE void q3_k_scales(const uint8_t* packed, int8_t scale[16]) {
  for (int i = 0; i < 16; ++i) {
    const int low = packed[i % 8] >> (i / 8 * 4) & 15;
    const int high = packed[8 + i % 4] >> (i / 4 * 2) & 3;
    scale[i] = static_cast<int8_t>((low | high << 4) - 32);
  }
}

// Each decode_* takes one block apart: u of its values, and a scale (and minimum) for each group of the packed format.

HASTEN_INLINE void decode_nibbles(const uint8_t* q, uint8_t* u) {
  for (int i = 0; i < 16; ++i) {
    u[i] = q[i] & 15;
    u[i + 16] = q[i] >> 4;
  }
}

HASTEN_INLINE void decode_fifths(const uint8_t* q, uint8_t* u) {
  uint32_t high;
  std::memcpy(&high, q, 4);
  decode_nibbles(q + 4, u);
  for (int i = 0; i < 32; ++i) u[i] |= (high >> i & 1) << 4;
}

HASTEN_INLINE void decode_q8_0(const uint8_t* q, uint8_t* u) {
  for (int i = 0; i < 32; ++i) u[i] = q[i] ^ 0x80;
}

HASTEN_INLINE void decode_q2_k(const uint8_t* b, uint8_t* u, float* scale, float* minimum) {
  const float d = half_at(b + 80), dmin = half_at(b + 82);
  for (int g = 0; g < 16; ++g) {  // halves of 128 values, then pairs of bits, then 16 a scale
    const uint8_t* q = b + 16 + g / 8 * 32 + g % 2 * 16;
    const int shift = g % 8 / 2 * 2;
    scale[g] = d * (b[g] & 15);
    minimum[g] = -(dmin * (b[g] >> 4));
    for (int i = 0; i < 16; ++i) u[g * 16 + i] = q[i] >> shift & 3;
  }
}

HASTEN_INLINE void decode_q3_k(const uint8_t* b, uint8_t* u, float* scale) {
  int8_t scales[16];
  q3_k_scales(b + 96, scales);
  const float d = half_at(b + 108);
  for (int g = 0; g < 16; ++g) {  // as Q2_K; a high bit that is clear subtracts 4, and u counts from -8
    const uint8_t* high = b + g % 2 * 16;
    const uint8_t* low = b + 32 + g / 8 * 32 + g % 2 * 16;
    const int shift = g % 8 / 2 * 2, bit = g / 2;
    scale[g] = d * scales[g];
    for (int i = 0; i < 16; ++i) u[g * 16 + i] = (low[i] >> shift & 3) + 4 + (high[i] >> bit & 1) * 4;
  }
}

// Q4_K and Q5_K: `low` holds two groups of 32 in its nibbles, `high` (Q5_K alone) one bit a value and group.
HASTEN_INLINE void decode_q45_k(const uint8_t* b, const uint8_t* high, const uint8_t* low, uint8_t* u, float* scale,
                                float* minimum) {
  uint8_t scales[8], minimums[8];
  k_scales(b + 4, scales, minimums);
  const float d = half_at(b), dmin = half_at(b + 2);
  for (int g = 0; g < 8; ++g) {
    const uint8_t* q = low + g / 2 * 32;
    const int shift = g % 2 * 4;
    scale[g] = d * scales[g];
    minimum[g] = -(dmin * minimums[g]);
    for (int i = 0; i < 32; ++i) u[g * 32 + i] = q[i] >> shift & 15;
    if (high)
      for (int i = 0; i < 32; ++i) u[g * 32 + i] |= (high[i] >> g & 1) << 4;
  }
}

HASTEN_INLINE void decode_q6_k(const uint8_t* b, uint8_t* u, float* scale) {
  const float d = half_at(b + 208);
  for (int g = 0; g < 16; ++g) {  // halves of 128 values, then quarters of 32, then 16 a scale
    const int half = g / 8, quarter = g % 8 / 2, part = g % 2 * 16;
    const uint8_t* low = b + half * 64 + quarter % 2 * 32 + part;
    const uint8_t* high = b + 128 + half * 32 + part;
    const int low_shift = quarter / 2 * 4, high_shift = quarter * 2;
    scale[g] = d * static_cast<int8_t>(b[192 + g]);
    for (int i = 0; i < 16; ++i) u[g * 16 + i] = (low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4;
  }
}

// A block of our own: a scale (and a minimum) and one byte a value.
HASTEN_INLINE void decode_bytes(const PackedFormat& format, const uint8_t* b, uint8_t* u, float* scale,
                                float* minimum) {
  std::memcpy(scale, b, 4);
  if (!format.symmetric) std::memcpy(minimum, b + 4, 4);
  std::memcpy(u, b + (format.symmetric ? 4 : 8), format.group);
}

HASTEN_INLINE void decode_block(const DtypeInfo& info, const uint8_t* b, uint8_t* u, float* scale, float* minimum) {
  const Dtype dtype = info.dtype;
  if (dtype >= Dtype::S4_32) return decode_bytes(info.format, b, u, scale, minimum);
  switch (dtype) {
    case Dtype::Q2_K: return decode_q2_k(b, u, scale, minimum);
    case Dtype::Q3_K: return decode_q3_k(b, u, scale);
    case Dtype::Q4_K: return decode_q45_k(b, nullptr, b + 16, u, scale, minimum);
    case Dtype::Q5_K: return decode_q45_k(b, b + 16, b + 48, u, scale, minimum);
    case Dtype::Q6_K: return decode_q6_k(b, u, scale);
    case Dtype::IQ4_XS: return decode_iq4_xs(b, u, scale);
    case Dtype::IQ3_XXS: return decode_iq3_xxs(b, u, scale);
    case Dtype::IQ3_S: return decode_iq3_s(b, u, scale);
    case Dtype::IQ2_XXS: return decode_iq2_xxs(b, u, scale);
    case Dtype::IQ2_XS: return decode_iq2_xs(b, u, scale);
    case Dtype::IQ2_S: return decode_iq2_s(b, u, scale);
    case Dtype::IQ1_S: return decode_iq1_s(b, u, scale);
    case Dtype::IQ1_M: return decode_iq1_m(b, u, scale);
    case Dtype::TQ1_0: return decode_tq1_0(b, u, scale);
    case Dtype::TQ2_0: return decode_tq2_0(b, u, scale);
    case Dtype::MXFP4: return decode_mxfp4(b, u, scale);
    default: break;
  }
  scale[0] = half_at(b);
  switch (dtype) {
    case Dtype::Q8_0: return decode_q8_0(b + 2, u);
    case Dtype::IQ4_NL: return decode_iq4_nl(b + 2, u);
    case Dtype::Q4_0: return decode_nibbles(b + 2, u);
    case Dtype::Q5_0: return decode_fifths(b + 2, u);
    case Dtype::Q4_1: minimum[0] = half_at(b + 2); return decode_nibbles(b + 4, u);
    case Dtype::Q5_1: minimum[0] = half_at(b + 2); return decode_fifths(b + 4, u);
    default: return;
  }
}

HASTEN_CLONES void dequantize_blocks(const DtypeInfo& info, const uint8_t* src, size_t blocks, float* out) {
  const int group = info.format.group;
  const float zero = info.format.symmetric ? static_cast<float>(1 << (info.format.bits - 1)) : 0.0f;
  uint8_t u[256];
  float scale[16], minimum[16];
  for (float& m : minimum) m = -0.0f;  // x + -0 is x, signed zeros too
  for (; blocks--; src += info.bytes, out += info.block) {
    decode_block(info, src, u, scale, minimum);
    for (int g = 0; g < info.block / group; ++g)
      for (int i = g * group; i < (g + 1) * group; ++i) out[i] = scale[g] * (u[i] - zero) + minimum[g];
  }
}

}  // namespace

const DtypeInfo* find_dtype(std::string_view name) {
  for (const DtypeInfo& info : kDtypes)
    if (info.name == name) return &info;
  return nullptr;
}

const DtypeInfo& info_of(Dtype dtype) { return kDtypes[static_cast<int>(dtype)]; }

HASTEN_CLONES void decode_groups(Dtype dtype, const uint8_t* src, size_t n, uint8_t* u, float* scale, float* minimum) {
  const DtypeInfo& info = info_of(dtype);
  const int groups = info.block / info.format.group;
  for (size_t i = 0; i < n / info.block; ++i, u += info.block, scale += groups, minimum += groups)
    decode_block(info, src + i * info.bytes, u, scale, minimum);
}

void dequantize(Dtype dtype, const uint8_t* src, size_t n, float* out) {
  switch (dtype) {
    case Dtype::F32: std::memcpy(out, src, 4 * n); break;
    case Dtype::F16: read_f16(src, n, out); break;
    case Dtype::BF16: read_bf16(src, n, out); break;
    default: dequantize_blocks(info_of(dtype), src, n / info_of(dtype).block, out);
  }
}

}  // namespace hasten
