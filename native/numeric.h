// fp16 and bf16 as bits, for code that no instruction set speeds up.
#pragma once

#include <bit>
#include <cstdint>

namespace hasten {

using bf16 = uint16_t;  // bits of a bfloat16
using fp16 = uint16_t;  // bits of an IEEE half

inline float bf16_to_float(bf16 v) { return std::bit_cast<float>(uint32_t{v} << 16); }

// Round to nearest even; NaN stays NaN.
inline bf16 float_to_bf16(float v) {
  const uint32_t u = std::bit_cast<uint32_t>(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((u >> 16) | 0x40);
  return static_cast<bf16>((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

inline float fp16_to_float(fp16 h) {
  const uint32_t sign = uint32_t{h} >> 15 << 31;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude < 0x400u) {  // zero and subnormals: an exact product
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
}

// Round to nearest even; overflow becomes infinity.
inline fp16 float_to_fp16(float v) {
  const uint32_t u = std::bit_cast<uint32_t>(v);
  const auto sign = static_cast<fp16>(u >> 16 & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude >= 0x7f800000u) return sign | (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u);
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
  if (magnitude < 0x38800000u) {  // subnormal half: let the float adder round it
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<fp16>(std::bit_cast<uint32_t>(shifted) - 0x3f000000u);
  }
  return sign | static_cast<fp16>((magnitude + 0xfffu + ((magnitude >> 13) & 1) - 0x38000000u) >> 13);
}

// 2^y for y <= 0: y is split without error into a whole number n and a rest f in [-0.5, 0.5], and 2^f is this minimax
// polynomial (highest power first), good to 1e-7 of itself and exactly 1 for f = 0. One multiplication takes the base
// of e^x, and a temperature with it. Below kLowestPower, where results would soon be subnormal, they are 0.
constexpr float kLowestPower = -125.9f;
constexpr float kPowerTerms[7] = {1.5353362e-4f, 1.3398875e-3f, 9.6184374e-3f, 5.5503325e-2f,
                                  2.4022648e-1f, 6.9314720e-1f, 1.0f};

// The largest magnitude; NaN if any value is one. (Their bits are the largest of all.)
inline float largest_magnitude(const float* x, int n) {
  uint32_t most = 0;
  for (int i = 0; i < n; i++) {
    const uint32_t magnitude = std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu;
    most = magnitude > most ? magnitude : most;
  }
  return std::bit_cast<float>(most);
}

// What values are multiplied with to become int8 when the largest magnitude is `most`: 0 where they are too small for
// that, or no numbers; the scale most / 127 then says which.
inline float to_int8_factor(float most) { return most > 0x1p-120f ? 127.0f / most : 0.0f; }

}  // namespace hasten
