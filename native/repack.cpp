// A GGUF tensor, or one of a GPTQ, AWQ or compressed-tensors checkpoint, into the packed layout, its integers as they
// are.
#include <algorithm>
#include <cmath>
#include <vector>

#include "block.h"
#include "numeric.h"
#include "pack.h"
#include "threads.h"

namespace hasten {

namespace {

// One panel taken apart: rows of u, and a scale and a minimum for each group.
struct PanelParts {
  std::vector<uint8_t> u;      // [16][cols]
  std::vector<float> scale;    // [16][groups]
  std::vector<float> minimum;  // [16][groups]
};

// The loss of one group whose scale and minimum were rounded: the error ds * u + dm is linear in u.
void add_group_loss(const uint8_t* u, int group, int zero, float scale, float minimum, float ds, float dm,
                    PackLoss& loss) {
  int sum = 0, squares = 0, low = 255, high = -255;
  for (int i = 0; i < group; ++i) {
    const int q = u[i] - zero;
    sum += q;
    squares += q * q;
    low = std::min(low, q);
    high = std::max(high, q);
  }
  const auto square_of = [&](double s, double m) { return s * s * squares + 2.0 * s * m * sum + m * m * group; };
  loss.squared_error += square_of(ds, dm);
  loss.squares += square_of(scale, minimum);
  loss.max_error = std::max({loss.max_error, std::fabs(double{ds} * low + dm), std::fabs(double{ds} * high + dm)});
}

// Rounds the scales in place to fp16; returns the column of a group whose scale is no fp16 number, or -1.
int round_scales(const DtypeInfo& info, int cols, const uint8_t* u, float* scale, float* minimum, PackLoss& loss) {
  const PackedFormat& format = info.format;
  const int zero = format.symmetric ? 1 << (format.bits - 1) : 0;
  for (int g = 0; g < cols / format.group; ++g) {
    const float s = fp16_to_float(float_to_fp16(scale[g]));
    const float m = format.symmetric ? 0.0f : fp16_to_float(float_to_fp16(minimum[g]));
    if (!std::isfinite(s) || !std::isfinite(m)) return g * format.group;
    if (!info.exact)
      add_group_loss(u + g * format.group, format.group, zero, scale[g], format.symmetric ? 0.0f : minimum[g],
                     scale[g] - s, format.symmetric ? 0.0f : minimum[g] - m, loss);
  }
  return -1;
}

void write_halves(const float* values, int stride, uint8_t* out) {
  fp16 h[kPanelRows];
  for (int row = 0; row < kPanelRows; ++row) h[row] = float_to_fp16(values[row * static_cast<size_t>(stride)]);
  std::memcpy(out, h, sizeof h);
}

HASTEN_CLONES void write_quants(const PackedFormat& format, const uint8_t* u, int cols, int blocks, uint8_t* out) {
  alignas(64) uint8_t q[128 * kPanelRows];
  const int group = format.group;
  for (int b = 0; b < blocks; ++b, out += format.block_bytes()) {
    for (int row = 0; row < kPanelRows; ++row) {
      const uint8_t* from = u + row * static_cast<size_t>(cols) + b * group;
      for (int j = 0; j < group; ++j) q[j * kPanelRows + row] = from[j];
    }
    write_block(format, q, out);
  }
}

void write_panel(const PackedFormat& format, const PanelParts& parts, int cols, uint8_t* out) {
  const int groups = cols / format.group;
  write_quants(format, parts.u.data(), cols, groups, out);
  for (int g = 0; g < groups; ++g, out += format.block_bytes()) {
    write_halves(parts.scale.data() + g, groups, out + format.quant_bytes());
    if (!format.symmetric) write_halves(parts.minimum.data() + g, groups, out + format.quant_bytes() + 2 * kPanelRows);
  }
}

// Returns the place of the first group whose scale cannot be held, or -1.
int64_t repack_panel(const WeightSource& source, const DtypeInfo& info, int panel, PanelParts& parts, PackLoss& loss,
                     uint8_t* out) {
  const int cols = source.cols, groups = cols / info.format.group;
  const auto zero = static_cast<uint8_t>(info.format.symmetric ? 1 << (info.format.bits - 1) : 0);
  for (int i = 0; i < kPanelRows; ++i) {
    const int row = panel * kPanelRows + i;
    uint8_t* u = parts.u.data() + i * static_cast<size_t>(cols);
    float* scale = parts.scale.data() + i * static_cast<size_t>(groups);
    float* minimum = parts.minimum.data() + i * static_cast<size_t>(groups);
    if (row >= source.rows) {
      std::fill(u, u + cols, zero);
      std::fill(scale, scale + groups, 0.0f);
      std::fill(minimum, minimum + groups, 0.0f);
      continue;
    }
    decode_groups(source.dtype, source.row(row), cols, u, scale, minimum);
    const int bad = round_scales(info, cols, u, scale, minimum, loss);
    if (bad >= 0) return static_cast<int64_t>(row) * cols + bad;
  }
  write_panel(info.format, parts, cols, out);
  return -1;
}

[[noreturn]] void fail_at(int64_t place, int cols, int block) {
  throw PackError("the scale of block " + std::to_string(place % cols / block) + " of row " +
                  std::to_string(place / cols) + " is not finite or too large for fp16");
}

}  // namespace

PackLoss pack_ggml(const WeightSource& source, int threads, uint8_t* out) {
  const DtypeInfo& info = info_of(source.dtype);
  if (info.format.bits == 16) return pack(source, info.format, threads, out);
  const int panels = round_up(source.rows, kPanelRows) / kPanelRows, groups = source.cols / info.format.group;
  std::vector<PackLoss> losses(panels);
  std::vector<int64_t> bad(panels, -1);
  pool().split(threads, panels, 1, [&](int begin, int end, int) {
    PanelParts parts{std::vector<uint8_t>(static_cast<size_t>(kPanelRows) * source.cols),
                     std::vector<float>(static_cast<size_t>(kPanelRows) * groups),
                     std::vector<float>(static_cast<size_t>(kPanelRows) * groups)};
    for (int panel = begin; panel < end; ++panel) {
      uint8_t* at = out + panel * info.format.panel_bytes(source.cols);
      bad[panel] = repack_panel(source, info, panel, parts, losses[panel], at);
      if (bad[panel] >= 0) return;
    }
  });
  for (int64_t place : bad)
    if (place >= 0) fail_at(place, source.cols, info.block);
  PackLoss total;
  for (const PackLoss& loss : losses) total.add(loss);
  return total;
}

}  // namespace hasten
