// The AMX kernels by name, and the tile registers' configuration they share.
#pragma once

#include <immintrin.h>

#include "isa/avx512.h"

namespace hasten::amx {

void linear_wide(const Packed& w, int p0, int p1, const bf16* x, size_t ldx, int m, float* out, size_t ldo, bool add);
void linear_bf16(const Packed& w, int p0, int p1, const bf16* x, size_t ldx, int m, float* out, size_t ldo, bool add);
void attend(const AttendPart& part);

constexpr int kTileRows = 16;

// Registers 0-3 hold results [tokens][16 floats or ints], 4-5 activations [tokens][a_bytes], 6-7 weights [b_rows][64
// bytes]. Gives the registers back when it goes: their 8 KB would be saved and restored at every context switch.
class Tiles {
 public:
  Tiles(int a_bytes, int b_rows) {
    config_.palette = 1;
    for (int i = 0; i < 8; i++) config_.bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? a_bytes : 64);
    for (int i = 6; i < 8; i++) config_.rows[i] = static_cast<uint8_t>(b_rows);
  }
  ~Tiles() {
    if (tokens_ > 0) _tile_release();
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  // Sets the number of tokens; clears the registers if it changes.
  void tokens(int count) {
    if (count == tokens_) return;
    tokens_ = count;
    for (int i = 0; i < 6; i++) config_.rows[i] = static_cast<uint8_t>(count);
    written();
    _tile_loadconfig(&config_);
  }

  // gcc 12 does not know that tile loads read memory: call between writing what a tile load reads and that load.
  static void written() { asm volatile("" ::: "memory"); }

 private:
  struct alignas(64) Config {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Config config_;
  int tokens_ = 0;
};

}  // namespace hasten::amx
