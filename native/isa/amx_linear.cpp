// Linear layers on AMX tiles. Integers: 16 tokens x 16 rows x 32 inputs a product, exact in int32, then scaled in float
// exactly as the AVX512 kernel does, so both give the same bits. bf16: tiles accumulate in float over the whole depth, for
// one token as for many, so that a token's result does not depend on its company.
#include <algorithm>

#include "isa/amx.h"
#include "isa/avx512_unpack.inl"

namespace hasten::amx {
namespace {

constexpr int kFewTokens = 6;      // up to here AVX512 streams weights as fast as memory gives them
constexpr int kTokenBlock = 256;   // tokens whose activations stay in L2 while panels pass by
constexpr int kDepth = 1024;       // inputs unpacked at a time: 16 KB, a third of L1
constexpr int kAhead = 4;          // groups multiplied before their results are scaled

struct Unpacked {
  alignas(64) int8_t q[kDepth * kPanelRows];        // per 4 inputs [16 rows][4], signed where the format is symmetric
  alignas(64) float scale[kDepth / 16 * kPanelRows];
  alignas(64) float minimum[kDepth / 16 * kPanelRows];
  alignas(64) float partial[kTokenBlock * kPanelRows];  // sums over the pieces of the depth so far
};

void unpack(const Packed& w, int p, int k0, int depth, int step, Unpacked& out) {
  const PackedFormat& format = w.format;
  const __m512i zero = _mm512_set1_epi8(static_cast<char>(format.symmetric ? 1 << (format.bits - 1) : 0));
  const uint8_t* block = w.panel(p) + static_cast<size_t>(k0 / format.group) * format.block_bytes();
  for (int k = 0; k < depth; k += format.group, block += format.block_bytes()) {
    auto* q = reinterpret_cast<uint8_t*>(out.q) + k * kPanelRows;
    avx512::unpack_block(format, block, q, 64);
    if (format.symmetric)
      for (int i = 0; i < format.group * kPanelRows; i += 64)
        _mm512_store_si512(q + i, _mm512_sub_epi8(_mm512_load_si512(q + i), zero));
    const __m512 scale = avx512::load_scales(block + format.quant_bytes());
    const __m512 minimum = format.symmetric ? _mm512_setzero_ps() : avx512::load_scales(block + format.quant_bytes() + 32);
    for (int s = 0; s < format.group; s += step) {
      _mm512_store_ps(out.scale + (k + s) / step * kPanelRows, scale);
      _mm512_store_ps(out.minimum + (k + s) / step * kPanelRows, minimum);
    }
  }
}

// One product of a group into tile C: tokens x rows over STEP inputs. A macro, since gcc wants register numbers spelled out.
#define HASTEN_MULTIPLY(C, A, B, a, lda, b, dots) \
  do {                                            \
    _tile_zero(C);                                \
    _tile_loadd(A, a, lda);                       \
    _tile_loadd(B, b, 64);                        \
    if constexpr (SYMMETRIC)                      \
      _tile_dpbssd(C, A, B);                      \
    else                                          \
      _tile_dpbsud(C, A, B);                      \
    _tile_stored(C, dots, 64);                    \
  } while (false)

struct Piece {
  Unpacked* w;
  const QuantRows* x;
  int k0, depth;
  bool first, last, add;  // of the pieces of the depth: sums start at zero with the first and reach `out` with the last
  int block;              // first token of the block
  float* out;  // of the panel's first row
  size_t ldo;
};

// sum[t] += scale * act[t] * dot[t] for the tokens of one group.
template <int STEP, bool SYMMETRIC, int TOKENS>
inline void scale_group(const Piece& piece, int t0, int g, const int32_t* dots, __m512* sum) {
  const QuantRows& x = *piece.x;
  const __m512 scale = _mm512_load_ps(piece.w->scale + g * kPanelRows);
  const __m512 minimum = _mm512_load_ps(piece.w->minimum + g * kPanelRows);
  const float* act = x.scale + static_cast<size_t>(t0) * (x.cols / 32) + (piece.k0 + g * STEP) / 32;
  const int32_t* nsum = (STEP == 16 ? x.nsum16 : x.nsum) + static_cast<size_t>(t0) * (x.cols / STEP) + piece.k0 / STEP + g;
#pragma GCC unroll 16
  for (int t = 0; t < TOKENS; t++) {
    const float a = act[static_cast<size_t>(t) * (x.cols / 32)];
    const __m512 dot = _mm512_cvtepi32_ps(_mm512_load_si512(dots + 16 * t));
    sum[t] = _mm512_fmadd_ps(dot, _mm512_mul_ps(scale, _mm512_set1_ps(a)), sum[t]);
    if constexpr (!SYMMETRIC) {
      const float total = a * static_cast<float>(-nsum[static_cast<size_t>(t) * (x.cols / STEP)]);
      sum[t] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(total), sum[t]);
    }
  }
}

template <int STEP, bool SYMMETRIC, int TOKENS>
void tile_piece(const Piece& piece, int t0) {
  alignas(64) int32_t dots[2][kAhead][kTileRows * 16];  // two sets: one is scaled while the next is multiplied
  const QuantRows& x = *piece.x;
  const int8_t* a = x.q + static_cast<size_t>(t0) * x.cols + piece.k0;
  float *out = piece.out + t0 * piece.ldo, *partial = piece.w->partial + (t0 - piece.block) * kPanelRows;
  __m512 sum[TOKENS];
#pragma GCC unroll 16
  for (int t = 0; t < TOKENS; t++) sum[t] = piece.first ? _mm512_setzero_ps() : _mm512_load_ps(partial + 16 * t);
  const int groups = piece.depth / STEP;
  int g = 0;
  for (; g + kAhead <= groups; g += kAhead) {
    auto& now = dots[g / kAhead % 2];
    const int8_t *ga = a + g * STEP, *gb = piece.w->q + g * STEP * kPanelRows;
    HASTEN_MULTIPLY(0, 4, 6, ga, x.cols, gb, now[0]);
    HASTEN_MULTIPLY(1, 5, 7, ga + STEP, x.cols, gb + STEP * kPanelRows, now[1]);
    HASTEN_MULTIPLY(2, 4, 6, ga + 2 * STEP, x.cols, gb + 2 * STEP * kPanelRows, now[2]);
    HASTEN_MULTIPLY(3, 5, 7, ga + 3 * STEP, x.cols, gb + 3 * STEP * kPanelRows, now[3]);
    for (int i = 0; i < kAhead; i++) scale_group<STEP, SYMMETRIC, TOKENS>(piece, t0, g + i, now[i], sum);
  }
  for (; g < groups; g++) {
    HASTEN_MULTIPLY(0, 4, 6, a + g * STEP, x.cols, piece.w->q + g * STEP * kPanelRows, dots[0][0]);
    scale_group<STEP, SYMMETRIC, TOKENS>(piece, t0, g, dots[0][0], sum);
  }
#pragma GCC unroll 16
  for (int t = 0; t < TOKENS; t++) {
    float* o = out + t * piece.ldo;
    if (!piece.last) _mm512_store_ps(partial + 16 * t, sum[t]);
    else _mm512_storeu_ps(o, piece.add ? _mm512_add_ps(_mm512_loadu_ps(o), sum[t]) : sum[t]);
  }
}

// The last tokens, fewer than a tile: in pieces of 8, 4, 2, 1, each a program of its own with its sums in registers.
template <int STEP, bool SYMMETRIC, int TOKENS = 8>
void tile_rest(const Piece& piece, int t, int end, Tiles& tiles) {
  if (t + TOKENS <= end) {
    tiles.tokens(TOKENS);
    tile_piece<STEP, SYMMETRIC, TOKENS>(piece, t);
    t += TOKENS;
  }
  if constexpr (TOKENS > 1) tile_rest<STEP, SYMMETRIC, TOKENS / 2>(piece, t, end, tiles);
}

template <int STEP, bool SYMMETRIC>
void tiled(const Packed& w, int p0, int p1, const QuantRows& x, int m, float* out, size_t ldo, bool add) {
  static thread_local Unpacked unpacked;
  Tiles tiles(STEP, STEP / 4);
  const int depth = w.padded_cols();
  for (int t0 = 0; t0 < m; t0 += kTokenBlock)
    for (int p = p0; p < p1; p++)
      for (int k0 = 0; k0 < depth; k0 += kDepth) {
        const int here = std::min(kDepth, depth - k0), t1 = std::min(m, t0 + kTokenBlock);
        unpack(w, p, k0, here, STEP, unpacked);
        Tiles::written();
        const Piece piece{&unpacked, &x, k0, here, k0 == 0, k0 + here == depth, add, t0, out + p * kPanelRows, ldo};
        int t = t0;
        for (; t + kTileRows <= t1; t += kTileRows) {
          tiles.tokens(kTileRows);
          tile_piece<STEP, SYMMETRIC, kTileRows>(piece, t);
        }
        tile_rest<STEP, SYMMETRIC>(piece, t, t1, tiles);
      }
}

// 2 x 2 tiles of 16 tokens x 16 rows; A and C tiles hold `second` tokens in the lower half, B tiles 32 inputs each.
struct Bf16Block {
  const bf16* w[2];
  const bf16* x[2];
  size_t ldx;
  int depth;
  bool two_panels, two_tokens;
};

template <bool TWO_TOKENS, bool TWO_PANELS>
inline void bf16_products(const Bf16Block& b) {
  _tile_zero(0);
  if constexpr (TWO_PANELS) _tile_zero(1);
  if constexpr (TWO_TOKENS) _tile_zero(2);
  if constexpr (TWO_TOKENS && TWO_PANELS) _tile_zero(3);
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
}

void bf16_block(const Bf16Block& b, int tokens, float* out, size_t ldo, bool add) {
  if (b.two_tokens && b.two_panels) bf16_products<true, true>(b);
  else if (b.two_tokens) bf16_products<true, false>(b);
  else if (b.two_panels) bf16_products<false, true>(b);
  else bf16_products<false, false>(b);
  alignas(64) float c[4][kTileRows * 16];
  _tile_stored(0, c[0], 64);
  if (b.two_panels) _tile_stored(1, c[1], 64);
  if (b.two_tokens) _tile_stored(2, c[2], 64);
  if (b.two_tokens && b.two_panels) _tile_stored(3, c[3], 64);
  for (int half = 0; half < (b.two_tokens ? 2 : 1); half++)
    for (int t = 0; t < tokens; t++)
      for (int r = 0; r < (b.two_panels ? 2 : 1); r++) {
        float* o = out + (half * kTileRows + t) * ldo + r * kPanelRows;
        const __m512 sum = _mm512_load_ps(c[2 * half + r] + 16 * t);
        _mm512_storeu_ps(o, add ? _mm512_add_ps(_mm512_loadu_ps(o), sum) : sum);
      }
}

}  // namespace

void linear_int(const Packed& w, int p0, int p1, const QuantRows& x, int m, float* out, size_t ldo, bool add) {
  if (m <= kFewTokens) return avx512::linear_int(w, p0, p1, x, m, out, ldo, add);
  const bool halves = w.format.group == 16;
  if (w.format.symmetric) {
    if (halves) tiled<16, true>(w, p0, p1, x, m, out, ldo, add);
    else tiled<32, true>(w, p0, p1, x, m, out, ldo, add);
  } else {
    if (halves) tiled<16, false>(w, p0, p1, x, m, out, ldo, add);
    else tiled<32, false>(w, p0, p1, x, m, out, ldo, add);
  }
}

void linear_bf16(const Packed& w, int p0, int p1, const bf16* x, size_t ldx, int m, float* out, size_t ldo, bool add) {
  Tiles tiles(64, 16);
  for (int t0 = 0; t0 < m; t0 += kTokenBlock)
    for (int p = p0; p < p1; p += 2) {
      const int t1 = std::min(m, t0 + kTokenBlock);
      for (int t = t0; t < t1;) {
        const bool two = t + 2 * kTileRows <= t1;
        const int tokens = std::min(kTileRows, t1 - t);
        tiles.tokens(tokens);
        Bf16Block block{{}, {x + t * ldx, x + (t + kTileRows) * ldx}, ldx, w.padded_cols(), p + 1 < p1, two};
        for (int r = 0; r < 2 && p + r < p1; r++) block.w[r] = reinterpret_cast<const bf16*>(w.panel(p + r));
        bf16_block(block, tokens, out + t * ldo + p * kPanelRows, ldo, add);
        t += two ? 2 * kTileRows : tokens;
      }
    }
}

}  // namespace hasten::amx
