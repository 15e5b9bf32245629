// AMX: eight tiles of 16 rows of 64 bytes. Four hold sums, which covers a latency of 52 cycles at 16 an instruction.
#include <immintrin.h>

#include "probe.h"

namespace hasten {
namespace {

// Source: Intel SDM volume 1, "Tile configuration", palette 1.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

// GCC's tile intrinsics name eight bytes of what they read: without this it drops the stores of the others.
inline void keep(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

void set_up() {
  const TileConfig config;
  keep(&config);
  _tile_loadconfig(&config);
  // Not zeros: a multiplier at rest draws less power and may be clocked higher than a working one. As bf16, below 1.
  alignas(64) uint8_t values[1024];
  for (int i = 0; i < 1024; i++) values[i] = i * 37 & 0x3f;
  keep(values);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, values, 64);
  _tile_loadd(5, values, 64);
  _tile_loadd(6, values, 64);
  _tile_loadd(7, values, 64);
}

uint64_t read(const uint8_t* data, size_t bytes, int streams, int ahead) {
  return kProbeAvx512.read(data, bytes, streams, ahead);
}

void int8_peak(int64_t rounds) {
  set_up();
  for (int64_t r = 0; r < rounds; r++) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
}

void bf16_peak(int64_t rounds) {
  set_up();
  for (int64_t r = 0; r < rounds; r++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

constexpr double kOps = 4 * 2.0 * 16 * 16;  // four tiles of 16 x 16 sums

}  // namespace

constinit const ProbeKernels kProbeAmx = {"amx", read, {int8_peak, kOps * 64}, {bf16_peak, kOps * 32}, {}};

}  // namespace hasten
