// One block of a packed panel, written and read: the bit planes of layout.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "lanes.h"
#include "layout.h"

namespace hasten {

// Four bytes of each of 16 rows next to one another: out[row] = q[0][row] | q[1][row] << 8 | ...
HASTEN_INLINE void write_quads(const uint8_t* q, uint8_t* out) {
  uint32_t words[kPanelRows];
  for (int row = 0; row < kPanelRows; ++row)
    words[row] = q[row] | uint32_t{q[16 + row]} << 8 | uint32_t{q[32 + row]} << 16 | uint32_t{q[48 + row]} << 24;
  std::memcpy(out, words, sizeof words);
}

HASTEN_INLINE void write_nibbles(const uint8_t* q, int group, uint8_t* out) {
  uint8_t pair[4 * kPanelRows];
  for (int j = 0; j < group / 8; ++j, q += 8 * kPanelRows) {
    for (int i = 0; i < 4 * kPanelRows; ++i) pair[i] = static_cast<uint8_t>((q[i] & 15) | q[4 * kPanelRows + i] << 4);
    write_quads(pair, out + 64 * j);
  }
}

HASTEN_INLINE void write_bit4(const uint8_t* q, int group, uint8_t* out) {
  for (int i = 0; i < group / 4; ++i, q += 4 * kPanelRows) {
    uint8_t nibble[kPanelRows];
    for (int row = 0; row < kPanelRows; ++row)
      nibble[row] = static_cast<uint8_t>((q[row] >> 4 & 1) | (q[16 + row] >> 4 & 1) << 1 | (q[32 + row] >> 4 & 1) << 2 |
                                         (q[48 + row] >> 4 & 1) << 3);
    for (int row = 0; row < kPanelRows; row += 2) out[8 * i + row / 2] = nibble[row] | nibble[row + 1] << 4;
  }
}

HASTEN_INLINE void write_bits45(const uint8_t* q, int group, uint8_t* out) {
  uint8_t steps[4 * kPanelRows];
  for (int c = 0; c < group / 16; ++c, q += 16 * kPanelRows) {
    for (int i = 0; i < 4 * kPanelRows; ++i)
      steps[i] = static_cast<uint8_t>((q[i] >> 4 & 3) | (q[64 + i] >> 4 & 3) << 2 | (q[128 + i] >> 4 & 3) << 4 |
                                      (q[192 + i] >> 4 & 3) << 6);
    write_quads(steps, out + 64 * c);
  }
}

// q: u of the block as [group][16 rows]. Scales are the caller's, at out + quant_bytes().
HASTEN_INLINE void write_block(const PackedFormat& format, const uint8_t* q, uint8_t* out) {
  if (format.bits == 8) {
    for (int i = 0; i < format.group / 4; ++i) write_quads(q + 64 * i, out + 64 * i);
    return;
  }
  write_nibbles(q, format.group, out);
  if (format.bits == 5) write_bit4(q, format.group, out + 8 * format.group);
  if (format.bits == 6) write_bits45(q, format.group, out + 8 * format.group);
}

// u of one row of the block, `group` of them.
HASTEN_INLINE void read_block_row(const PackedFormat& format, const uint8_t* block, int row, uint8_t* u) {
  const int group = format.group;
  if (format.bits == 8) {
    for (int i = 0; i < group / 4; ++i) std::memcpy(u + 4 * i, block + 64 * i + 4 * row, 4);
    return;
  }
  for (int j = 0; j < group / 8; ++j) {
    uint32_t word;
    std::memcpy(&word, block + 64 * j + 4 * row, 4);
    const uint32_t low = word & 0x0f0f0f0fu, high = word >> 4 & 0x0f0f0f0fu;
    std::memcpy(u + 8 * j, &low, 4);
    std::memcpy(u + 8 * j + 4, &high, 4);
  }
  const uint8_t* plane = block + 8 * group;
  if (format.bits == 5) {
    for (int i = 0; i < group / 4; ++i) {
      const int nibble = plane[8 * i + row / 2] >> (row % 2 * 4) & 15;
      for (int t = 0; t < 4; ++t) u[4 * i + t] |= static_cast<uint8_t>((nibble >> t & 1) << 4);
    }
  } else if (format.bits == 6) {
    for (int i = 0; i < group / 4; ++i) {
      uint32_t word;
      std::memcpy(&word, plane + 64 * (i / 4) + 4 * row, 4);
      uint32_t value;
      std::memcpy(&value, u + 4 * i, 4);
      value |= (word >> (i % 4 * 2) & 0x03030303u) << 4;
      std::memcpy(u + 4 * i, &value, 4);
    }
  }
}

}  // namespace hasten
