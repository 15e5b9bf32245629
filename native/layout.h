// How packed weights lie in memory and on disk. One layout serves every instruction set.
//
// A matrix [rows, cols] is cut into panels of 16 output rows (the last one padded with zero rows), a panel into blocks
// of `group` inputs (cols padded with zeros to a multiple of max(group, 32)). Blocks of a panel follow one another, so
// one thread reads one panel as a single stream. Inside a block rows are interleaved so that 64 bytes feed 16 rows:
//
// clang-format off
//   bits 16   per 2 inputs: [16 rows][2] bf16; no scales                                  64 bytes
//   bits 8    per 4 inputs: [16 rows][4] u8, u = q + 128                                  64 bytes
//   bits 4-6  plane of nibbles, per 8 inputs j: byte row*4+t holds the low four bits
//             of u at input 8j+t (low nibble) and at input 8j+4+t (high nibble)           64 bytes
//   bits 5    then a plane of bit 4, per 4 inputs: bit row*4+t of one little-endian
//             64-bit word                                                                  8 bytes
//   bits 6    then a plane of bits 4 and 5, per 16 inputs: byte row*4+t holds two bits
//             of each of the four steps of 4 inputs, step s at bits 2s and 2s+1           64 bytes
//   scales    16 fp16, one a row; then, asymmetric only, 16 fp16 minimums
// clang-format on
//
// Value: symmetric  scale * (u - 2^(bits-1));  asymmetric  scale * u + minimum.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hasten {

constexpr int kPanelRows = 16;
constexpr int kActGroup = 32;  // activations carry one scale for 32 inputs, whatever the weights' group

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// Values of `size` bytes from a row to the next, at least `count` and whole cache lines: an odd number of them. Rows a
// power of two apart meet in one place of the first cache, and tiles of 16 rows then take half as long again.
constexpr int row_stride(int count, int size) { return (((count * size + 63) / 64) | 1) * 64 / size; }

// What a packed matrix is made of; the bytes themselves are elsewhere.
struct PackedFormat {
  int bits = 16;
  int group = 32;
  bool symmetric = true;

  int padded_cols(int cols) const { return round_up(cols, bits == 16 ? 32 : (group > 32 ? group : 32)); }
  int quant_bytes() const {  // of one block, without scales
    switch (bits) {
      case 8: return 16 * group;
      case 6: return 12 * group;
      case 5: return 10 * group;
      default: return 8 * group;
    }
  }
  int block_bytes() const { return quant_bytes() + (symmetric ? 32 : 64); }
  size_t panel_bytes(int cols) const {
    const size_t k = padded_cols(cols);
    return bits == 16 ? k * 32 : k / group * block_bytes();
  }
  size_t bytes(int rows, int cols) const { return round_up(rows, kPanelRows) / kPanelRows * panel_bytes(cols); }
};

// A packed matrix in memory that someone else owns.
struct Packed {
  PackedFormat format;
  int rows = 0;
  int cols = 0;
  const uint8_t* data = nullptr;

  int panels() const { return round_up(rows, kPanelRows) / kPanelRows; }
  int padded_cols() const { return format.padded_cols(cols); }
  const uint8_t* panel(int p) const { return data + p * format.panel_bytes(cols); }
};

}  // namespace hasten
