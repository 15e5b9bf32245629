// Blocks of GGUF's IQ, TQ and MXFP4 types taken apart: u of the values and a scale for each group of the packed format,
// as in ggml.cpp. Source: the dequantize_row functions of ggml-quants.c (the published format).
#pragma once

#include <cstdint>
#include <cstring>

#include "ggml_grids.h"
#include "lanes.h"
#include "numeric.h"

namespace hasten {

constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr uint8_t kIq2Levels[4] = {8, 25, 43, 0};
constexpr uint8_t kIq3XxsLevels[8] = {4, 12, 20, 28, 36, 44, 52, 62};
constexpr int8_t kE2m1Doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

HASTEN_INLINE float half_at(const uint8_t* p) {
  fp16 h;
  std::memcpy(&h, p, 2);
  return fp16_to_float(h);
}

HASTEN_INLINE uint32_t u16_at(const uint8_t* p) { return p[0] | uint32_t{p[1]} << 8; }

HASTEN_INLINE uint32_t u32_at(const uint8_t* p) { return u16_at(p) | u16_at(p + 2) << 16; }

// Eight signs of which seven are stored: a point has an even number of them.
HASTEN_INLINE uint32_t even_signs(uint32_t seven) {
  uint32_t odd = seven ^ seven >> 4;
  odd ^= odd >> 2;
  odd ^= odd >> 1;
  return seven | (odd & 1) << 7;
}

HASTEN_INLINE uint8_t signed_u(int middle, int magnitude, uint32_t negative) {
  return static_cast<uint8_t>(negative ? middle - magnitude : middle + magnitude);
}

// A point of eight coordinates of IQ2's grids, with a sign each.
HASTEN_INLINE void iq2_point(uint32_t point, uint32_t signs, uint8_t* u) {
  for (int i = 0; i < 8; ++i) u[i] = signed_u(128, kIq2Levels[point >> 2 * i & 3], signs >> i & 1);
}

HASTEN_INLINE void decode_iq2_xxs(const uint8_t* b, uint8_t* u, float* scale) {
  const float d = half_at(b);
  for (int g = 0; g < 8; ++g) {  // four points, their signs, a scale
    const uint8_t* q = b + 2 + 8 * g;
    const uint32_t rest = u32_at(q + 4);
    scale[g] = d * (0.5f + static_cast<float>(rest >> 28)) * 0.25f;
    for (int i = 0; i < 4; ++i) iq2_point(kIq2XxsGrid[q[i]], even_signs(rest >> 7 * i & 127), u + 32 * g + 8 * i);
  }
}

HASTEN_INLINE void iq2_scales(const uint8_t* b, const uint8_t* packed, float* scale) {
  const float d = half_at(b);
  for (int g = 0; g < 16; ++g) scale[g] = d * (0.5f + static_cast<float>(packed[g / 2] >> g % 2 * 4 & 15)) * 0.25f;
}

HASTEN_INLINE void decode_iq2_xs(const uint8_t* b, uint8_t* u, float* scale) {
  iq2_scales(b, b + 66, scale);
  for (int i = 0; i < 32; ++i) {
    const uint32_t q = u16_at(b + 2 + 2 * i);
    iq2_point(kIq2XsGrid[q & 511], even_signs(q >> 9), u + 8 * i);
  }
}

HASTEN_INLINE void decode_iq2_s(const uint8_t* b, uint8_t* u, float* scale) {
  iq2_scales(b, b + 74, scale);
  for (int i = 0; i < 32; ++i) {
    const uint32_t high = b[66 + i / 4] >> i % 4 * 2 & 3;
    iq2_point(kIq2SGrid[b[2 + i] | high << 8], b[34 + i], u + 8 * i);
  }
}

HASTEN_INLINE void decode_iq3_xxs(const uint8_t* b, uint8_t* u, float* scale) {
  const float d = half_at(b);
  for (int g = 0; g < 8; ++g) {
    const uint32_t rest = u32_at(b + 66 + 4 * g);
    scale[g] = d * (0.5f + static_cast<float>(rest >> 28)) * 0.5f;
    for (int i = 0; i < 8; ++i) {
      const uint32_t signs = even_signs(rest >> i / 2 * 7 & 127) >> i % 2 * 4;
      const uint32_t point = kIq3XxsGrid[b[2 + 8 * g + i]];
      for (int j = 0; j < 4; ++j)
        u[32 * g + 4 * i + j] = signed_u(128, kIq3XxsLevels[point >> 3 * j & 7], signs >> j & 1);
    }
  }
}

HASTEN_INLINE void decode_iq3_s(const uint8_t* b, uint8_t* u, float* scale) {
  const float d = half_at(b);
  for (int g = 0; g < 8; ++g) {
    scale[g] = d * static_cast<float>(1 + 2 * (b[106 + g / 2] >> g % 2 * 4 & 15));
    for (int i = 0; i < 8; ++i) {
      const int at = 8 * g + i;
      const uint32_t point = kIq3SGrid[b[2 + at] | (b[66 + g] >> i & 1) << 8];
      const uint32_t signs = b[74 + at / 2] >> at % 2 * 4;
      for (int j = 0; j < 4; ++j)
        u[4 * at + j] = signed_u(16, static_cast<int>(2 * (point >> 3 * j & 7) + 1), signs >> j & 1);
    }
  }
}

// A point of IQ1's grid, moved up or down by an eighth of a step: in eighths, which are the values' units.
HASTEN_INLINE void iq1_point(uint32_t point, uint32_t is_down, uint8_t* u) {
  for (int i = 0; i < 8; ++i)
    u[i] = static_cast<uint8_t>(16 + 8 * (static_cast<int>(point >> 2 * i & 3) - 1) + (is_down ? -1 : 1));
}

HASTEN_INLINE void decode_iq1_s(const uint8_t* b, uint8_t* u, float* scale) {
  const float d = half_at(b);
  for (int g = 0; g < 8; ++g) {
    const uint32_t high = u16_at(b + 34 + 2 * g);
    scale[g] = d * static_cast<float>(2 * (high >> 12 & 7) + 1) * 0.125f;
    for (int i = 0; i < 4; ++i)
      iq1_point(kIq1Grid[b[2 + 4 * g + i] | (high >> 3 * i & 7) << 8], high >> 15, u + 32 * g + 8 * i);
  }
}

HASTEN_INLINE void decode_iq1_m(const uint8_t* b, uint8_t* u, float* scale) {
  uint32_t packed[4];
  for (int i = 0; i < 4; ++i) packed[i] = u16_at(b + 48 + 2 * i);
  const auto bits =
      static_cast<uint16_t>(packed[0] >> 12 | packed[1] >> 12 << 4 | packed[2] >> 12 << 8 | packed[3] >> 12 << 12);
  uint8_t whole[2];
  std::memcpy(whole, &bits, 2);
  const float d = half_at(whole);  // its sixteen bits are spread over four numbers
  for (int g = 0; g < 16; ++g) {
    scale[g] = d * static_cast<float>(2 * (packed[g / 4] >> g % 4 * 3 & 7) + 1) * 0.125f;
    for (int i = 0; i < 2; ++i) {
      const uint32_t high = b[32 + g] >> 4 * i & 15;
      iq1_point(kIq1Grid[b[2 * g + i] | (high & 7) << 8], high >> 3, u + 16 * g + 8 * i);
    }
  }
}

HASTEN_INLINE void decode_iq4_nl(const uint8_t* q, uint8_t* u) {
  for (int i = 0; i < 16; ++i) {
    u[i] = static_cast<uint8_t>(kIq4Values[q[i] & 15] + 128);
    u[i + 16] = static_cast<uint8_t>(kIq4Values[q[i] >> 4] + 128);
  }
}

HASTEN_INLINE void decode_iq4_xs(const uint8_t* b, uint8_t* u, float* scale) {
  const float d = half_at(b);
  const uint32_t high = u16_at(b + 2);
  for (int g = 0; g < 8; ++g) {
    const int low = b[4 + g / 2] >> g % 2 * 4 & 15;
    scale[g] = d * static_cast<float>((low | static_cast<int>(high >> 2 * g & 3) << 4) - 32);
    decode_iq4_nl(b + 8 + 16 * g, u + 32 * g);
  }
}

// Five values of -1, 0, 1 a byte, the first one highest: a byte times a power of 3 has the next one in front.
HASTEN_INLINE void decode_tq1_0(const uint8_t* b, uint8_t* u, float* scale) {
  constexpr uint8_t kPowers[5] = {1, 3, 9, 27, 81};
  scale[0] = scale[1] = half_at(b + 52);
  const auto value = [&](uint8_t byte, int power) {
    return static_cast<uint8_t>(7 + (static_cast<uint8_t>(byte * kPowers[power]) * 3 >> 8));
  };
  for (int n = 0; n < 5; ++n) {
    for (int i = 0; i < 32; ++i) u[32 * n + i] = value(b[i], n);
    for (int i = 0; i < 16; ++i) u[160 + 16 * n + i] = value(b[32 + i], n);
  }
  for (int n = 0; n < 4; ++n)
    for (int i = 0; i < 4; ++i) u[240 + 4 * n + i] = value(b[48 + i], n);
}

HASTEN_INLINE void decode_tq2_0(const uint8_t* b, uint8_t* u, float* scale) {
  scale[0] = scale[1] = half_at(b + 64);
  for (int i = 0; i < 256; ++i) u[i] = static_cast<uint8_t>(7 + (b[i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3));
}

// Values of 4 bits are kept doubled, so the power of two is halved; 2^-128 is a subnormal float.
HASTEN_INLINE void decode_mxfp4(const uint8_t* b, uint8_t* u, float* scale) {
  const uint32_t bits = b[0] < 2 ? 0x00200000u << b[0] : uint32_t{b[0] - 1u} << 23;
  std::memcpy(scale, &bits, 4);
  for (int i = 0; i < 16; ++i) {
    u[i] = static_cast<uint8_t>(16 + kE2m1Doubled[b[1 + i] & 15]);
    u[i + 16] = static_cast<uint8_t>(16 + kE2m1Doubled[b[1 + i] >> 4]);
  }
}

}  // namespace hasten
