#include "pack.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "block.h"
#include "numeric.h"
#include "threads.h"

// This file is compiled with -ffp-contract=off: the packed bytes must not depend on whether a machine has FMA.

namespace hasten {

namespace {

constexpr float kHalfMax = 65504.0f;
constexpr float kHalfTiny = 0x1p-24f;   // the smallest fp16
constexpr float kVanishing = 0x1p-26f;  // a group below this packs as zeros
constexpr float kBf16Max = 0x1.fep127f;

struct Loss8 {  // one lane a row
  f32x8 squared_error = {}, squares = {}, max_error = {};
};

// fp16 bits of a scale. A subnormal is rounded up: rounding it down would clip the largest weights of the group.
HASTEN_INLINE fp16 scale_to_half(float scale) {
  const float magnitude = std::min(std::fabs(scale), kHalfMax);
  if (magnitude == 0.0f) return 0;
  if (magnitude >= 0x1p-14f) return float_to_fp16(std::copysign(magnitude, scale));
  const auto units = static_cast<fp16>(std::ceil(magnitude / kHalfTiny));
  return scale < 0.0f ? units | 0x8000u : units;
}

HASTEN_INLINE f32x8 halves(f32x8 scale, uint8_t* out) {
  f32x8 rounded = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    const fp16 h = scale_to_half(scale[lane]);
    std::memcpy(out + 2 * lane, &h, 2);
    rounded[lane] = fp16_to_float(h);
  }
  return rounded;
}

HASTEN_INLINE f32x8 reciprocal_or_zero(f32x8 v) { return v == 0.0f ? all8(0.0f) : 1.0f / v; }

// Where the largest magnitude lands, in steps: six places around -2^(bits-1), the end with one step more, and six
// around 2^(bits-1) - 1. Twelve reach within 0.2 % (4 bits) to 2 % (6 bits) of the error that forty reach.
constexpr int kCandidates = 12;
HASTEN_INLINE float candidate(int bits, int i) {
  const float n = static_cast<float>(1 << (bits - 1));
  return i < 6 ? -(n - 0.9f + 0.36f * static_cast<float>(i)) : n - 1.7f + 0.32f * static_cast<float>(i - 6);
}

// The scale that leaves the least squared error among the candidates, each followed by a least-squares fit of the
// scale to its integers (as make_qx_quants of ggml-quants.c does for its k-quants). x: [group][16 rows].
HASTEN_INLINE f32x8 search_scale(const float* x, int group, int bits) {
  const float low = -static_cast<float>(1 << (bits - 1)), high = -low - 1.0f;
  f32x8 peak = {}, magnitude = {};
  for (int j = 0; j < group; ++j) {
    const f32x8 v = load8(x + j * kPanelRows), a = abs8(v);
    peak = a > magnitude ? v : peak;
    magnitude = max8(a, magnitude);
  }
  const f32x8 unit = magnitude < kVanishing ? all8(0.0f) : 1.0f / peak;
  constexpr int kTogether = 4;
  f32x8 best = {}, best_gain = {};
  for (int c = 0; c < kCandidates; c += kTogether) {
    f32x8 inverse[kTogether], xq[kTogether] = {}, qq[kTogether] = {};
    for (int k = 0; k < kTogether; ++k) inverse[k] = unit * candidate(bits, c + k);
    for (int j = 0; j < group; ++j) {
      const f32x8 v = load8(x + j * kPanelRows);
      for (int k = 0; k < kTogether; ++k) {
        const f32x8 q = min8(max8(round8(v * inverse[k]), all8(low)), all8(high));
        xq[k] += v * q;
        qq[k] += q * q;
      }
    }
    for (int k = 0; k < kTogether; ++k) {  // the error left is sum(x^2) - xq^2 / qq
      const f32x8 scale = xq[k] * reciprocal_or_zero(qq[k]), gain = scale * xq[k];
      best = gain > best_gain ? scale : best;
      best_gain = max8(gain, best_gain);
    }
  }
  return best;
}

HASTEN_INLINE void store_u(f32x8 u, uint8_t* q) {
  for (int lane = 0; lane < kLanes; ++lane) q[lane] = static_cast<uint8_t>(static_cast<int32_t>(u[lane]));
}

HASTEN_INLINE void add_loss(f32x8 x, f32x8 error, Loss8& loss) {
  loss.squared_error += error * error;
  loss.squares += x * x;
  loss.max_error = max8(abs8(error), loss.max_error);
}

// Eight rows of a block: x and q are [group][16 rows], scales the block's fp16 values of these rows.
HASTEN_INLINE void quantise_symmetric(const float* x, int group, int bits, uint8_t* q, uint8_t* scales, Loss8& loss) {
  const float zero = static_cast<float>(1 << (bits - 1));
  f32x8 scale;
  if (bits == 8) {
    f32x8 magnitude = {};
    for (int j = 0; j < group; ++j) magnitude = max8(abs8(load8(x + j * kPanelRows)), magnitude);
    scale = magnitude < kVanishing ? all8(0.0f) : magnitude / 127.0f;
  } else {
    scale = search_scale(x, group, bits);
  }
  scale = halves(scale, scales);
  const f32x8 inverse = reciprocal_or_zero(scale);
  const f32x8 low = all8(bits == 8 ? -127.0f : -zero), high = all8(zero - 1.0f);
  for (int j = 0; j < group; ++j) {
    const f32x8 v = load8(x + j * kPanelRows);
    const f32x8 step = min8(max8(round8(v * inverse), low), high);
    add_loss(v, v - scale * step, loss);
    store_u(step + zero, q + j * kPanelRows);
  }
}

// The same with a minimum; only the first `valid` of the group count, the rest is padding and packs as u = 0.
HASTEN_INLINE void quantise_asymmetric(const float* x, int group, int valid, int bits, uint8_t* q, uint8_t* scales,
                                       Loss8& loss) {
  const float levels = static_cast<float>((1 << bits) - 1);
  f32x8 low = load8(x), high = low;
  for (int j = 1; j < valid; ++j) {
    const f32x8 v = load8(x + j * kPanelRows);
    low = min8(v, low);
    high = max8(v, high);
  }
  f32x8 minimum = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    const fp16 h = float_to_fp16(low[lane]);
    std::memcpy(scales + 2 * kPanelRows + 2 * lane, &h, 2);
    minimum[lane] = fp16_to_float(h);
  }
  const f32x8 span = max8(high - minimum, all8(0.0f));
  const f32x8 scale = halves(span < kVanishing ? all8(0.0f) : span / levels, scales);
  const f32x8 inverse = reciprocal_or_zero(scale);
  for (int j = 0; j < group; ++j) {
    if (j >= valid) {
      store_u(all8(0.0f), q + j * kPanelRows);
      continue;
    }
    const f32x8 v = load8(x + j * kPanelRows);
    const f32x8 u = min8(max8(round8((v - minimum) * inverse), all8(0.0f)), all8(levels));
    add_loss(v, v - (scale * u + minimum), loss);
    store_u(u, q + j * kPanelRows);
  }
}

// rows: [16][stride] floats of a panel; x: [group][16] of the inputs from `first` on, zero beyond `valid`.
HASTEN_INLINE void gather_block(const float* rows, int stride, int first, int valid, int group, float* x) {
  for (int row = 0; row < kPanelRows; ++row)
    for (int j = 0; j < valid; ++j) x[j * kPanelRows + row] = rows[row * static_cast<size_t>(stride) + first + j];
  std::memset(x + valid * kPanelRows, 0, sizeof(float) * (group - valid) * kPanelRows);
}

void add_panel_loss(const Loss8& loss, PackLoss& total) {
  for (int lane = 0; lane < kLanes; ++lane) {
    total.squared_error += loss.squared_error[lane];
    total.squares += loss.squares[lane];
    total.max_error = std::max<double>(total.max_error, loss.max_error[lane]);
  }
}

HASTEN_CLONES void pack_panel(const float* rows, int cols, const PackedFormat& format, uint8_t* out, PackLoss* total) {
  alignas(64) float x[128 * kPanelRows];
  alignas(64) uint8_t q[128 * kPanelRows];
  const int group = format.group;
  for (int first = 0; first < format.padded_cols(cols); first += group, out += format.block_bytes()) {
    const int valid = std::clamp(cols - first, 0, group);
    gather_block(rows, cols, first, valid, group, x);
    for (int half = 0; half < kPanelRows; half += kLanes) {
      Loss8 loss;
      uint8_t* scales = out + format.quant_bytes() + 2 * half;
      if (format.symmetric)
        quantise_symmetric(x + half, group, format.bits, q + half, scales, loss);
      else
        quantise_asymmetric(x + half, group, valid, format.bits, q + half, scales, loss);
      add_panel_loss(loss, *total);
    }
    write_block(format, q, out);
  }
}

HASTEN_CLONES void pack_panel_bf16(const float* rows, int cols, uint8_t* out, PackLoss* total) {
  const int padded = PackedFormat{16, 32, true}.padded_cols(cols);
  std::memset(out, 0, static_cast<size_t>(padded) * 32);
  for (int row = 0; row < kPanelRows; ++row) {
    const float* x = rows + row * static_cast<size_t>(cols);
    double squared_error = 0.0, squares = 0.0, max_error = 0.0;
    for (int c = 0; c < cols; ++c) {
      const bf16 value = float_to_bf16(x[c]);
      std::memcpy(out + c / 2 * 64 + row * 4 + c % 2 * 2, &value, 2);
      const double error = static_cast<double>(x[c]) - bf16_to_float(value);
      squared_error += error * error;
      squares += static_cast<double>(x[c]) * x[c];
      max_error = std::max(max_error, std::fabs(error));
    }
    total->squared_error += squared_error;
    total->squares += squares;
    total->max_error = std::max(total->max_error, max_error);
  }
}

// Adds the offset and gives the bits of the largest magnitude, which order as the magnitudes do, infinity and NaN last.
HASTEN_CLONES uint32_t finish_row(float* row, int n, float offset) {
  uint32_t largest = 0;
  for (int i = 0; i < n; ++i) {
    row[i] += offset;
    uint32_t u;
    std::memcpy(&u, row + i, 4);
    u &= 0x7fffffffu;
    largest = u > largest ? u : largest;
  }
  return largest;
}

// The largest magnitude whose scale and minimum are fp16 numbers.
float limit_of(const PackedFormat& format) {
  if (format.bits == 16) return kBf16Max;
  return format.symmetric ? kHalfMax * static_cast<float>((1 << (format.bits - 1)) - 1) : kHalfMax;
}

[[noreturn]] void fail_at(const WeightSource& source, int64_t place, float limit) {
  const int row = static_cast<int>(place / source.cols), col = static_cast<int>(place % source.cols);
  std::vector<float> values(source.cols);
  dequantize(source.dtype, source.row(row), source.cols, values.data());
  const float value = values[col] + source.offset;
  const std::string at = "row " + std::to_string(row) + ", column " + std::to_string(col);
  if (!std::isfinite(value)) throw PackError("the value at " + at + " is " + (std::isnan(value) ? "NaN" : "infinite"));
  throw PackError("the value at " + at + " is " + std::to_string(value) + ", larger than the layout's " +
                  std::to_string(limit));
}

// Fills rows[16][cols] of one panel; returns the place of the first value that cannot be packed, or -1.
int64_t read_panel(const WeightSource& source, int panel, float limit, float* rows) {
  const uint32_t limit_bits = std::bit_cast<uint32_t>(limit);
  for (int i = 0; i < kPanelRows; ++i) {
    const int row = panel * kPanelRows + i;
    float* out = rows + i * static_cast<size_t>(source.cols);
    if (row >= source.rows) {
      std::fill(out, out + source.cols, 0.0f);
      continue;
    }
    dequantize(source.dtype, source.row(row), source.cols, out);
    if (finish_row(out, source.cols, source.offset) <= limit_bits) continue;
    for (int c = 0; c < source.cols; ++c)
      if (!(std::fabs(out[c]) <= limit)) return static_cast<int64_t>(row) * source.cols + c;
  }
  return -1;
}

}  // namespace

PackLoss pack(const WeightSource& source, const PackedFormat& format, int threads, uint8_t* out) {
  const int panels = round_up(source.rows, kPanelRows) / kPanelRows;
  const float limit = limit_of(format);
  std::vector<PackLoss> losses(panels);
  std::vector<int64_t> bad(panels, -1);
  pool().split(threads, panels, 1, [&](int begin, int end, int) {
    std::vector<float> rows(static_cast<size_t>(kPanelRows) * source.cols);
    for (int panel = begin; panel < end; ++panel) {
      bad[panel] = read_panel(source, panel, limit, rows.data());
      if (bad[panel] >= 0) return;
      uint8_t* at = out + panel * format.panel_bytes(source.cols);
      if (format.bits == 16)
        pack_panel_bf16(rows.data(), source.cols, at, &losses[panel]);
      else
        pack_panel(rows.data(), source.cols, format, at, &losses[panel]);
    }
  });
  for (int64_t place : bad)
    if (place >= 0) fail_at(source, place, limit);
  PackLoss total;
  for (const PackLoss& loss : losses) total.add(loss);
  return total;
}

}  // namespace hasten
