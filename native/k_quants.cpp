#include <algorithm>
#include <cmath>
#include <cstring>

#include "ggml.h"
#include "lanes.h"
#include "numeric.h"

// This file is compiled with -ffp-contract=off: the written bytes must not depend on whether a machine has FMA.

namespace hasten {

namespace {

HASTEN_INLINE float sum_of(f32x8 v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

HASTEN_INLINE void put_half(uint8_t* at, fp16 value) { std::memcpy(at, &value, 2); }

// fp16 bits of the unit of scales. A subnormal is rounded away from zero: the largest scale is then some steps of it.
HASTEN_INLINE fp16 unit_to_half(float unit) {
  const float magnitude = std::fabs(unit);
  if (magnitude == 0.0f || magnitude >= 0x1p-14f) return float_to_fp16(unit);
  const auto steps = static_cast<fp16>(std::ceil(magnitude * 0x1p24f));
  return unit < 0.0f ? steps | 0x8000u : steps;
}

// A value is scale * u + minimum; minimum is 0 or less.
struct Line {
  float scale = 0.0f, minimum = 0.0f;
};

constexpr int kTries = 13;

// The line that leaves the least squared error in 32 values among some: each try spreads the values over a few steps
// more or fewer than there are, rounds, and fits scale and minimum to the integers by least squares.
HASTEN_INLINE Line fit_line(const float* x, int levels) {
  f32x8 v[4], lows = all8(0.0f), highs = load8(x), sums = {}, squares = {};
  for (int k = 0; k < 4; ++k) {
    v[k] = load8(x + 8 * k);
    lows = min8(v[k], lows);
    highs = max8(v[k], highs);
    sums += v[k];
    squares += v[k] * v[k];
  }
  float low = lows[0], high = highs[0];
  for (int i = 1; i < kLanes; ++i) {
    low = std::min(low, lows[i]);
    high = std::max(high, highs[i]);
  }
  const float span = high - low, top = static_cast<float>(levels), n = 32.0f;
  if (!(span > 0x1p-40f)) return {0.0f, low};
  const float sx = sum_of(sums), sxx = sum_of(squares);
  Line best{span / top, low};
  float least = INFINITY;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    const float inverse = (top - 1.2f + 0.2f * static_cast<float>(attempt)) / span;
    f32x8 us = {}, uus = {}, uxs = {};
    for (int k = 0; k < 4; ++k) {
      const f32x8 u = min8(max8(round8((v[k] - low) * inverse), all8(0.0f)), all8(top));
      us += u;
      uus += u * u;
      uxs += u * v[k];
    }
    const float su = sum_of(us), suu = sum_of(uus), sux = sum_of(uxs), det = n * suu - su * su;
    if (!(det > 0.0f)) continue;
    Line line{(n * sux - su * sx) / det, 0.0f};
    line.minimum = (sx - line.scale * su) / n;
    if (line.minimum > 0.0f) line = {sux / suu, 0.0f};
    if (!(line.scale > 0.0f)) continue;
    const float s = line.scale, m = line.minimum;
    const float error = sxx - 2.0f * (s * sux + m * sx) + s * s * suu + 2.0f * s * m * su + n * m * m;
    if (error < least) {
      least = error;
      best = line;
    }
  }
  return best;
}

// A number as one of `most` steps of a unit.
HASTEN_INLINE uint8_t step_of(float value, float unit, int most) {
  return unit > 0.0f ? static_cast<uint8_t>(std::clamp(std::nearbyint(value / unit), 0.0f, static_cast<float>(most)))
                     : uint8_t{0};
}

// Q4_K and Q5_K: eight groups of 32, scales and minimums as 6 bits of one fp16 each; see decode_q45_k of ggml.cpp.
HASTEN_INLINE void encode_q45_k(const float* x, int bits, uint8_t* out) {
  const int levels = (1 << bits) - 1;
  Line lines[8];
  float most_scale = 0.0f, most_minimum = 0.0f;
  for (int g = 0; g < 8; ++g) {
    lines[g] = fit_line(x + 32 * g, levels);
    most_scale = std::max(most_scale, lines[g].scale);
    most_minimum = std::max(most_minimum, -lines[g].minimum);
  }
  const fp16 half = unit_to_half(most_scale / 63.0f), half_minimum = unit_to_half(most_minimum / 63.0f);
  const float d = fp16_to_float(half), dmin = fp16_to_float(half_minimum);
  std::memset(out, 0, bits == 4 ? 144 : 176);
  put_half(out, half);
  put_half(out + 2, half_minimum);
  uint8_t* packed = out + 4;
  uint8_t* high = out + 16;  // Q5_K alone
  uint8_t* low = out + (bits == 4 ? 16 : 48);
  uint8_t scale[8], minimum[8];
  for (int g = 0; g < 8; ++g) {
    scale[g] = step_of(lines[g].scale, d, 63);
    minimum[g] = step_of(-lines[g].minimum, dmin, 63);
    const float unit = d * scale[g], least = dmin * minimum[g], inverse = unit > 0.0f ? 1.0f / unit : 0.0f;
    for (int i = 0; i < 32; ++i) {
      const float steps = std::nearbyint((x[32 * g + i] + least) * inverse);
      const auto u = static_cast<int>(std::clamp(steps, 0.0f, static_cast<float>(levels)));
      low[g / 2 * 32 + i] |= static_cast<uint8_t>((u & 15) << (g % 2 * 4));
      if (bits == 5) high[i] |= static_cast<uint8_t>((u >> 4) << g);
    }
  }
  for (int i = 0; i < 4; ++i) {
    packed[i] = static_cast<uint8_t>(scale[i] | scale[i + 4] >> 4 << 6);
    packed[i + 4] = static_cast<uint8_t>(minimum[i] | minimum[i + 4] >> 4 << 6);
    packed[i + 8] = static_cast<uint8_t>((scale[i + 4] & 15) | (minimum[i + 4] & 15) << 4);
  }
}

// The scale that leaves the least squared error in 16 values as integers from -32 to 31, of either sign: as
// search_scale of pack.cpp does for a panel.
HASTEN_INLINE float fit_scale(const float* x) {
  const f32x8 v[2] = {load8(x), load8(x + 8)};
  float peak = 0.0f;
  for (int i = 0; i < 16; ++i) peak = std::fabs(x[i]) > std::fabs(peak) ? x[i] : peak;
  if (std::fabs(peak) < 0x1p-40f) return 0.0f;
  float best = 0.0f, most = 0.0f;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    const float landing =
        attempt < 7 ? -(31.1f + 0.3f * static_cast<float>(attempt)) : 30.2f + 0.3f * static_cast<float>(attempt - 7);
    const float inverse = landing / peak;
    f32x8 uus = {}, uxs = {};
    for (int k = 0; k < 2; ++k) {
      const f32x8 u = min8(max8(round8(v[k] * inverse), all8(-32.0f)), all8(31.0f));
      uus += u * u;
      uxs += u * v[k];
    }
    const float suu = sum_of(uus), sux = sum_of(uxs);
    if (!(suu > 0.0f)) continue;
    const float scale = sux / suu, gain = scale * sux;  // the error left is sum(x^2) - gain
    if (gain > most) {
      most = gain;
      best = scale;
    }
  }
  return best;
}

// Q6_K: sixteen groups of 16, scales as int8 of one fp16; see decode_q6_k of ggml.cpp.
HASTEN_INLINE void encode_q6_k(const float* x, uint8_t* out) {
  float scales[16], peak = 0.0f;
  for (int g = 0; g < 16; ++g) {
    scales[g] = fit_scale(x + 16 * g);
    peak = std::fabs(scales[g]) > std::fabs(peak) ? scales[g] : peak;
  }
  const fp16 half = unit_to_half(peak / -128.0f);
  const float d = fp16_to_float(half);
  std::memset(out, 0, 210);
  put_half(out + 208, half);
  for (int g = 0; g < 16; ++g) {
    const float steps = d != 0.0f ? std::clamp(std::nearbyint(scales[g] / d), -128.0f, 127.0f) : 0.0f;
    const auto scale = static_cast<int8_t>(steps);
    out[192 + g] = static_cast<uint8_t>(scale);
    const float unit = d * scale, inverse = unit != 0.0f ? 1.0f / unit : 0.0f;
    const int part = g / 8, quarter = g % 8 / 2, begin = g % 2 * 16;
    uint8_t* low = out + part * 64 + quarter % 2 * 32 + begin;
    uint8_t* high = out + 128 + part * 32 + begin;
    for (int i = 0; i < 16; ++i) {
      const auto u = static_cast<int>(std::clamp(std::nearbyint(x[16 * g + i] * inverse), -32.0f, 31.0f)) + 32;
      low[i] |= static_cast<uint8_t>((u & 15) << (quarter / 2 * 4));
      high[i] |= static_cast<uint8_t>((u >> 4) << (quarter * 2));
    }
  }
}

}  // namespace

bool is_written(Dtype dtype) { return dtype == Dtype::Q4_K || dtype == Dtype::Q5_K || dtype == Dtype::Q6_K; }

HASTEN_CLONES void quantize(Dtype dtype, const float* x, size_t n, uint8_t* out) {
  const DtypeInfo& info = info_of(dtype);
  for (size_t i = 0; i < n / info.block; ++i, x += info.block, out += info.bytes) {
    if (dtype == Dtype::Q6_K)
      encode_q6_k(x, out);
    else
      encode_q45_k(x, dtype == Dtype::Q4_K ? 4 : 5, out);
  }
}

}  // namespace hasten
