// Linear layers on AMX tiles, in bf16 with float sums.
//
// Integer weights have a scale for 32 inputs, so that int8 tiles would have to leave the tile unit every 32 inputs to
// be scaled: measured, 50 cycles a product that takes 16. Turned into bf16 once for all tokens of a prefill they need
// no scaling, and activations need no rounding to int8: four times as fast, and more exact.
#include <algorithm>

#include "isa/amx.h"
#include "isa/avx512_unpack.inl"

namespace hasten::amx {
namespace {

constexpr int kDepth = 1024;  // inputs at a time: 512 tokens of them are 1 MB and stay in L2 while the panels pass by

// 16 rows x 4 inputs of unsigned weights -> two registers of [16 rows][2] bf16; value = u * scale + bias.
inline void to_pairs(__m512i u, __m512 scale, __m512 bias, __m512i interleave, bf16* out) {
  const __m512i byte = _mm512_set1_epi32(255);
  const __m512i parts[4] = {_mm512_and_si512(u, byte), _mm512_and_si512(_mm512_srli_epi32(u, 8), byte),
                            _mm512_and_si512(_mm512_srli_epi32(u, 16), byte), _mm512_srli_epi32(u, 24)};
  for (int pair = 0; pair < 2; pair++) {
    const __m512 a = _mm512_fmadd_ps(_mm512_cvtepi32_ps(parts[2 * pair]), scale, bias);
    const __m512 b = _mm512_fmadd_ps(_mm512_cvtepi32_ps(parts[2 * pair + 1]), scale, bias);
    const auto both = (__m512i)_mm512_cvtne2ps_pbh(b, a);  // 16 of a, then 16 of b
    _mm512_store_si512(out + 32 * pair, _mm512_permutexvar_epi16(interleave, both));
  }
}

// `depth` inputs of a panel from k0 on as packed bf16.
void widen(const Packed& w, int p, int k0, int depth, bf16* out) {
  const PackedFormat& format = w.format;
  alignas(64) uint8_t u[128 * kPanelRows];
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 32; i++) order[i] = static_cast<uint16_t>(i / 2 + 16 * (i % 2));
  const __m512i interleave = _mm512_load_si512(order);
  const __m512 zero = _mm512_set1_ps(-static_cast<float>(1 << (format.bits - 1)));
  const uint8_t* block = w.panel(p) + static_cast<size_t>(k0 / format.group) * format.block_bytes();
  for (int k = 0; k < depth; k += format.group, block += format.block_bytes()) {
    avx512::unpack_block(format, block, u, 64);
    const __m512 scale = avx512::load_scales(block + format.quant_bytes());
    const __m512 bias =
        format.symmetric ? _mm512_mul_ps(zero, scale) : avx512::load_scales(block + format.quant_bytes() + 32);
    for (int i = 0; i < format.group; i += 4)
      to_pairs(_mm512_load_si512(u + i * kPanelRows), scale, bias, interleave, out + (k + i) * kPanelRows);
  }
}

// 2 x 2 tiles of 16 tokens x 16 rows, fewer at the edges; B tiles hold 32 inputs.
struct Block {
  const bf16* w[2];
  const bf16* x[2];
  size_t ldx;
  int depth;
  bool two_panels, two_tokens;
  bool add;  // sums start from what `out` holds
  float* out;
  size_t ldo;
};

// Register numbers must be spelled out for gcc, hence no loop.
template <bool TWO_TOKENS, bool TWO_PANELS>
inline void start_sums(const Block& b) {
  const size_t stride = 4 * b.ldo;
  float* lower = b.out + kTileRows * b.ldo;
  if (b.add) {
    _tile_loadd(0, b.out, stride);
    if constexpr (TWO_PANELS) _tile_loadd(1, b.out + kPanelRows, stride);
    if constexpr (TWO_TOKENS) _tile_loadd(2, lower, stride);
    if constexpr (TWO_TOKENS && TWO_PANELS) _tile_loadd(3, lower + kPanelRows, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
}

template <bool TWO_TOKENS, bool TWO_PANELS>
inline void store_sums(const Block& b) {
  const size_t stride = 4 * b.ldo;
  float* lower = b.out + kTileRows * b.ldo;
  _tile_stored(0, b.out, stride);
  if constexpr (TWO_PANELS) _tile_stored(1, b.out + kPanelRows, stride);
  if constexpr (TWO_TOKENS) _tile_stored(2, lower, stride);
  if constexpr (TWO_TOKENS && TWO_PANELS) _tile_stored(3, lower + kPanelRows, stride);
}

template <bool TWO_TOKENS, bool TWO_PANELS>
void products(const Block& b) {
  start_sums<TWO_TOKENS, TWO_PANELS>(b);
  for (int k = 0; k < b.depth; k += 32) {
    if constexpr (!TWO_TOKENS) {  // few tokens: weights come from memory
      for (int line = 0; line < 16; line++) {
        _mm_prefetch(reinterpret_cast<const char*>(b.w[0] + (k + 64) * kPanelRows) + 64 * line, _MM_HINT_T0);
        if constexpr (TWO_PANELS)
          _mm_prefetch(reinterpret_cast<const char*>(b.w[1] + (k + 64) * kPanelRows) + 64 * line, _MM_HINT_T0);
      }
    }
    _tile_loadd(4, b.x[0] + k, 2 * b.ldx);
    _tile_loadd(6, b.w[0] + k * kPanelRows, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (TWO_PANELS) {
      _tile_loadd(7, b.w[1] + k * kPanelRows, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (TWO_TOKENS) {
      _tile_loadd(5, b.x[1] + k, 2 * b.ldx);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (TWO_PANELS) _tile_dpbf16ps(3, 5, 7);
    }
  }
  store_sums<TWO_TOKENS, TWO_PANELS>(b);
}

// All tokens of a block against one or two panels, 32 tokens at a time.
void all_tokens(Block b, Tiles& tiles, int m) {
  const bf16* x = b.x[0];
  float* out = b.out;
  for (int t = 0; t < m;) {
    const int tokens = std::min(kTileRows, m - t);
    b.two_tokens = t + 2 * kTileRows <= m;
    b.x[0] = x + t * b.ldx;
    b.x[1] = b.x[0] + kTileRows * b.ldx;
    b.out = out + t * b.ldo;
    tiles.tokens(tokens);
    if (b.two_tokens && b.two_panels)
      products<true, true>(b);
    else if (b.two_tokens)
      products<true, false>(b);
    else if (b.two_panels)
      products<false, true>(b);
    else
      products<false, false>(b);
    t += b.two_tokens ? 2 * kTileRows : tokens;
  }
}

}  // namespace

void linear_wide(const Packed& w, int p0, int p1, const bf16* x, size_t ldx, int m, float* out, size_t ldo, bool add) {
  static thread_local struct {
    alignas(64) bf16 panel[2][kDepth * kPanelRows];
  } wide;
  Tiles tiles(64, 16);
  const int depth = w.padded_cols();
  for (int k0 = 0; k0 < depth; k0 += kDepth)
    for (int p = p0; p < p1; p += 2) {
      const int here = std::min(kDepth, depth - k0), panels = std::min(2, p1 - p);
      for (int r = 0; r < panels; r++) widen(w, p + r, k0, here, wide.panel[r]);
      Tiles::written();
      all_tokens({{wide.panel[0], wide.panel[1]},
                  {x + k0, nullptr},
                  ldx,
                  here,
                  panels == 2,
                  false,
                  add || k0 > 0,
                  out + p * kPanelRows,
                  ldo},
                 tiles, m);
    }
}

void linear_bf16(const Packed& w, int p0, int p1, const bf16* x, size_t ldx, int m, float* out, size_t ldo, bool add) {
  Tiles tiles(64, 16);
  const int depth = w.padded_cols();
  // Sums are stored and loaded again as they are, so cutting the depth changes nothing in the result.
  const int piece = m <= 2 * kTileRows ? depth : kDepth;
  for (int p = p0; p < p1; p += 2)
    for (int k0 = 0; k0 < depth; k0 += piece) {
      Block block{{},
                  {x + k0, nullptr},
                  ldx,
                  std::min(piece, depth - k0),
                  p + 1 < p1,
                  false,
                  add || k0 > 0,
                  out + p * kPanelRows,
                  ldo};
      for (int r = 0; r < 2 && p + r < p1; r++)
        block.w[r] = reinterpret_cast<const bf16*>(w.panel(p + r)) + k0 * kPanelRows;
      all_tokens(block, tiles, m);
    }
}

}  // namespace hasten::amx
