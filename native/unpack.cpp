#include "block.h"
#include "numeric.h"
#include "pack.h"

namespace hasten {

namespace {

void unpack_bf16_row(const Packed& packed, int row, float* out) {
  const uint8_t* panel = packed.panel(row / kPanelRows) + row % kPanelRows * 4;
  for (int c = 0; c < packed.cols; ++c) {
    bf16 value;
    std::memcpy(&value, panel + c / 2 * 64 + c % 2 * 2, 2);
    out[c] = bf16_to_float(value);
  }
}

HASTEN_INLINE float half_at(const uint8_t* p) {
  fp16 h;
  std::memcpy(&h, p, 2);
  return fp16_to_float(h);
}

template <int bits, bool symmetric>
HASTEN_INLINE void unpack_blocks(const Packed& packed, int row, float* out) {
  const PackedFormat format{bits, packed.format.group, symmetric};
  const uint8_t* block = packed.panel(row / kPanelRows);
  const int lane = row % kPanelRows;
  uint8_t u[128];
  for (int c = 0; c < packed.cols; c += format.group, block += format.block_bytes()) {
    read_block_row(format, block, lane, u);
    const uint8_t* scales = block + format.quant_bytes() + 2 * lane;
    const float scale = half_at(scales);
    const float minimum = symmetric ? -0.0f : half_at(scales + 2 * kPanelRows);
    const int zero = symmetric ? 1 << (bits - 1) : 0;
    const int n = packed.cols - c < format.group ? packed.cols - c : format.group;
    for (int i = 0; i < n; ++i) out[c + i] = scale * static_cast<float>(u[i] - zero) + minimum;
  }
}

HASTEN_CLONES void unpack_quantised_row(const Packed& packed, int row, float* out) {
  const bool symmetric = packed.format.symmetric;
  switch (packed.format.bits) {
    case 8: return symmetric ? unpack_blocks<8, true>(packed, row, out) : unpack_blocks<8, false>(packed, row, out);
    case 6: return symmetric ? unpack_blocks<6, true>(packed, row, out) : unpack_blocks<6, false>(packed, row, out);
    case 5: return symmetric ? unpack_blocks<5, true>(packed, row, out) : unpack_blocks<5, false>(packed, row, out);
    default: return symmetric ? unpack_blocks<4, true>(packed, row, out) : unpack_blocks<4, false>(packed, row, out);
  }
}

}  // namespace

void unpack_row(const Packed& packed, int row, float* out) {
  if (packed.format.bits == 16) return unpack_bf16_row(packed, row, out);
  unpack_quantised_row(packed, row, out);
}

}  // namespace hasten
