// Integer linear layers on AVX512-VNNI. Few tokens: weights stream from memory straight into VPDPBUSD on the unsigned
// values, the zero point folded into the accumulator's start through -sum(q). Many tokens: a panel pair is unpacked
// into L1 once and multiplied with tiles of 6 tokens x 32 rows.
#include <algorithm>

#include "isa/avx512.h"
#include "isa/avx512_unpack.inl"
#include "isa/repeat.h"

namespace hasten::avx512 {
namespace {

constexpr int kTile = 6;          // tokens a tile: 12 int and 12 float accumulators of the 32 registers
constexpr int kStreamed = 24;     // tokens up to which weights are streamed
constexpr int kTokenBlock = 192;  // tokens whose activations stay in L2 while panels pass by
constexpr int kAhead = 2304;      // bytes each stream is asked for before it is needed
constexpr int kDepth = 1024;      // inputs unpacked at a time: 32 KB of weights for a panel pair

inline void store(float* out, __m512 value, bool add) {
  _mm512_storeu_ps(out, add ? _mm512_add_ps(_mm512_loadu_ps(out), value) : value);
}

template <int BYTES>
[[gnu::always_inline]] inline void prefetch(const uint8_t* block) {
  repeat<(BYTES + 63) / 64>(
      HASTEN_EACH(line) { _mm_prefetch(reinterpret_cast<const char*>(block) + 64 * line, _MM_HINT_T0); });
}

// A format known at compile time: offsets become constants, which is worth a factor of two here.
template <int BITS, int GROUP, bool SYMMETRIC>
struct Block {
  static constexpr int kStep = GROUP < 32 ? GROUP : 32;  // inputs that share one weight scale and one activation scale
  static constexpr int kQuantBytes = 2 * BITS * GROUP;
  static constexpr int kBytes = kQuantBytes + (SYMMETRIC ? 32 : 64);
  static constexpr int kAheadBlocks = kAhead / kBytes + 1;
};

// M tokens x R panels over the whole depth, weights taken straight from the packed blocks.
template <int BITS, int GROUP, bool SYMMETRIC, int M, int R>
void stream_tile(const Packed& w, int p, const QuantRows& x, float* out, size_t ldo, bool add) {
  using B = Block<BITS, GROUP, SYMMETRIC>;
  constexpr int kStep = B::kStep;
  const uint8_t* panel[R];
  repeat<R>(HASTEN_EACH(r) { panel[r] = w.panel(p + r); });
  const size_t cols = x.cols;
  const int8_t* q = x.q;
  const float* act = x.scale;
  const int32_t* nsum = kStep == 16 ? x.nsum16 : x.nsum;
  // Near the end of a panel the next bytes are those of panel p + R: this one's neighbours are being read already.
  const size_t jump = (R - 1) * w.format.panel_bytes(w.cols);
  const int blocks = w.padded_cols() / GROUP;
  __m512 sum[R][M];
  repeat<R>(HASTEN_EACH(r) { repeat<M>(HASTEN_EACH(m) { sum[r][m] = _mm512_setzero_ps(); }); });
  for (int b = 0; b < blocks; b++) {
    const size_t ahead = B::kAheadBlocks * B::kBytes + (b + B::kAheadBlocks < blocks ? 0 : jump);
    repeat<R>(HASTEN_EACH(r) { prefetch<B::kBytes>(panel[r] + ahead); });
    repeat<GROUP / kStep>(HASTEN_EACH(s) {
      __m512i dot[R][M];
      repeat<M>(HASTEN_EACH(m) {
        __m512i start = _mm512_setzero_si512();
        if constexpr (SYMMETRIC) start = _mm512_slli_epi32(_mm512_set1_epi32(nsum[m * (cols / kStep) + s]), BITS - 1);
        repeat<R>(HASTEN_EACH(r) { dot[r][m] = start; });
      });
      repeat<kStep / 8>(HASTEN_EACH(j) {
        __m512i first[R], second[R];
        repeat<R>(HASTEN_EACH(r) { unpack8<BITS>(panel[r], GROUP, s * (kStep / 8) + j, first[r], second[r]); });
        repeat<M>(HASTEN_EACH(m) {
          const int8_t* at = q + m * cols + s * kStep + 8 * j;
          const __m512i a = broadcast4(at), c = broadcast4(at + 4);
          repeat<R>(HASTEN_EACH(r) { dot[r][m] = _mm512_dpbusd_epi32(dot[r][m], first[r], a); });
          repeat<R>(HASTEN_EACH(r) { dot[r][m] = _mm512_dpbusd_epi32(dot[r][m], second[r], c); });
        });
      });
      repeat<R>(HASTEN_EACH(r) {
        const __m512 scale = load_scales(panel[r] + B::kQuantBytes);
        repeat<M>(HASTEN_EACH(m) {
          const float a = act[m * (cols / 32) + (kStep == 16 ? 0 : s)];
          sum[r][m] =
              _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r][m]), _mm512_mul_ps(scale, _mm512_set1_ps(a)), sum[r][m]);
          if constexpr (!SYMMETRIC) {
            const float total = a * static_cast<float>(-nsum[m * (cols / kStep) + s]);
            sum[r][m] = _mm512_fmadd_ps(load_scales(panel[r] + B::kQuantBytes + 32), _mm512_set1_ps(total), sum[r][m]);
          }
        });
      });
    });
    repeat<R>(HASTEN_EACH(r) { panel[r] += B::kBytes; });
    q += GROUP;
    nsum += GROUP / kStep;
    act += kStep == 16 ? b % 2 : GROUP / 32;
  }
  repeat<R>(
      HASTEN_EACH(r) { repeat<M>(HASTEN_EACH(m) { store(out + m * ldo + (p + r) * kPanelRows, sum[r][m], add); }); });
}

template <int BITS, int GROUP, bool SYMMETRIC, int M>
void stream_panels(const Packed& w, int p0, int p1, const QuantRows& x, float* out, size_t ldo, bool add) {
  int p = p0;
  if constexpr (M == 1)
    for (; p + 4 <= p1; p += 4) stream_tile<BITS, GROUP, SYMMETRIC, M, 4>(w, p, x, out, ldo, add);
  for (; p + 2 <= p1; p += 2) stream_tile<BITS, GROUP, SYMMETRIC, M, 2>(w, p, x, out, ldo, add);
  for (; p < p1; p++) stream_tile<BITS, GROUP, SYMMETRIC, M, 1>(w, p, x, out, ldo, add);
}

// A panel pair's weights over `depth` inputs, unpacked.
struct Unpacked {
  alignas(64) uint8_t u[kDepth / 4 * 128];    // per 4 inputs: panel 0 [16][4], panel 1 [16][4]
  alignas(64) float scale[kDepth / 16 * 32];  // per step: 16 rows of panel 0, of panel 1
  alignas(64) float minimum[kDepth / 16 * 32];
  alignas(64) float partial[kTokenBlock * 32];  // sums over the pieces of the depth so far
};

template <int BITS>
void unpack_pair(const Packed& w, int p, int panels, int k0, int depth, int step, Unpacked& out) {
  const int group = w.format.group, block_bytes = w.format.block_bytes(), quant_bytes = w.format.quant_bytes();
  for (int r = 0; r < panels; r++) {
    const uint8_t* block = w.panel(p + r) + static_cast<size_t>(k0 / group) * block_bytes;
    for (int k = 0; k < depth; k += group, block += block_bytes) {
      for (int j = 0; j < group / 8; j++) {
        __m512i first, second;
        unpack8<BITS>(block, group, j, first, second);
        uint8_t* u = out.u + (k + 8 * j) / 4 * 128 + 64 * r;
        _mm512_store_si512(u, first);
        _mm512_store_si512(u + 128, second);
      }
      const __m512 scale = load_scales(block + quant_bytes);
      const __m512 minimum = w.format.symmetric ? _mm512_setzero_ps() : load_scales(block + quant_bytes + 32);
      for (int s = 0; s < group; s += step) {
        _mm512_store_ps(out.scale + (k + s) / step * 32 + 16 * r, scale);
        _mm512_store_ps(out.minimum + (k + s) / step * 32 + 16 * r, minimum);
      }
    }
  }
}

struct Tile {
  Unpacked* w;
  const QuantRows* x;
  int k0, depth, zero_shift;
  bool first, last, add;  // of the pieces of the depth: sums start at zero with the first and reach `out` with the last
  int t0;                 // first token of the block
  float* out;
  size_t ldo;
};

template <int STEP, bool SYMMETRIC, int R, int M>
void block_tile(const Tile& tile, int t) {
  const QuantRows& x = *tile.x;
  const size_t cols = x.cols;
  const int8_t* q = x.q + t * cols + tile.k0;
  const float* act = x.scale + t * (cols / 32) + tile.k0 / 32;
  const int32_t* nsum = (STEP == 16 ? x.nsum16 : x.nsum) + t * (cols / STEP) + tile.k0 / STEP;
  float *out = tile.out + t * tile.ldo, *partial = tile.w->partial + (t - tile.t0) * 32;
  const bool is_first = tile.first;
  __m512 sum[R][M];
  repeat<M>(HASTEN_EACH(m) {
    repeat<R>(
        HASTEN_EACH(r) { sum[r][m] = is_first ? _mm512_setzero_ps() : _mm512_load_ps(partial + 32 * m + 16 * r); });
  });
  const __m128i shift = _mm_cvtsi32_si128(tile.zero_shift);
  const uint8_t* u = tile.w->u;
  const float *scales = tile.w->scale, *minimums = tile.w->minimum;
  for (int g = 0; g < tile.depth / STEP; g++, u += STEP / 4 * 128) {
    __m512i dot[R][M];
    repeat<M>(HASTEN_EACH(m) {
      __m512i start = _mm512_setzero_si512();
      if constexpr (SYMMETRIC) start = _mm512_sll_epi32(_mm512_set1_epi32(nsum[m * (cols / STEP) + g]), shift);
      repeat<R>(HASTEN_EACH(r) { dot[r][m] = start; });
    });
    repeat<STEP / 4>(HASTEN_EACH(i) {
      __m512i weight[R];
      repeat<R>(HASTEN_EACH(r) { weight[r] = _mm512_load_si512(u + 128 * i + 64 * r); });
      repeat<M>(HASTEN_EACH(m) {
        const __m512i a = broadcast4(q + m * cols + g * STEP + 4 * i);
        repeat<R>(HASTEN_EACH(r) { dot[r][m] = _mm512_dpbusd_epi32(dot[r][m], weight[r], a); });
      });
    });
    repeat<M>(HASTEN_EACH(m) {
      const float a = act[m * (cols / 32) + g * STEP / 32];
      repeat<R>(HASTEN_EACH(r) {
        const __m512 scale = _mm512_mul_ps(_mm512_load_ps(scales + 32 * g + 16 * r), _mm512_set1_ps(a));
        sum[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r][m]), scale, sum[r][m]);
        if constexpr (!SYMMETRIC) {
          const __m512 total = _mm512_set1_ps(a * static_cast<float>(-nsum[m * (cols / STEP) + g]));
          sum[r][m] = _mm512_fmadd_ps(_mm512_load_ps(minimums + 32 * g + 16 * r), total, sum[r][m]);
        }
      });
    });
  }
  repeat<M>(HASTEN_EACH(m) {
    repeat<R>(HASTEN_EACH(r) {
      if (tile.last)
        store(out + m * tile.ldo + 16 * r, sum[r][m], tile.add);
      else
        _mm512_store_ps(partial + 32 * m + 16 * r, sum[r][m]);
    });
  });
}

template <int STEP, bool SYMMETRIC, int R>
void block_tiles(const Tile& tile, int t0, int t1) {
  int t = t0;
  for (; t + kTile <= t1; t += kTile) block_tile<STEP, SYMMETRIC, R, kTile>(tile, t);
  switch (t1 - t) {
    case 5: return block_tile<STEP, SYMMETRIC, R, 5>(tile, t);
    case 4: return block_tile<STEP, SYMMETRIC, R, 4>(tile, t);
    case 3: return block_tile<STEP, SYMMETRIC, R, 3>(tile, t);
    case 2: return block_tile<STEP, SYMMETRIC, R, 2>(tile, t);
    case 1: return block_tile<STEP, SYMMETRIC, R, 1>(tile, t);
    default: return;
  }
}

template <int BITS, int STEP, bool SYMMETRIC>
void blocked(const Packed& w, int p0, int p1, const QuantRows& x, int m, float* out, size_t ldo, bool add) {
  static thread_local Unpacked unpacked;
  const int depth = w.padded_cols();
  for (int t0 = 0; t0 < m; t0 += kTokenBlock)
    for (int p = p0; p < p1; p += 2) {
      const int panels = std::min(2, p1 - p);
      for (int k0 = 0; k0 < depth; k0 += kDepth) {
        const int here = std::min(kDepth, depth - k0), t1 = std::min(m, t0 + kTokenBlock);
        unpack_pair<BITS>(w, p, panels, k0, here, STEP, unpacked);
        const Tile tile{&unpacked, &x, k0, here, BITS - 1, k0 == 0, k0 + here == depth, add, t0, out + p * kPanelRows,
                        ldo};
        if (panels == 2)
          block_tiles<STEP, SYMMETRIC, 2>(tile, t0, t1);
        else
          block_tiles<STEP, SYMMETRIC, 1>(tile, t0, t1);
      }
    }
}

// The same activations from token t on.
QuantRows from_token(const QuantRows& x, int t) {
  const size_t at = static_cast<size_t>(t) * x.cols;
  return {x.q + at, x.scale + at / 32, x.nsum + at / 32, x.nsum16 + at / 16, x.cols};
}

template <int BITS>
void stream_tokens(const Packed& w, int p0, int p1, const QuantRows& x, int m, float* out, size_t ldo, bool add) {
  switch (m) {
    case 1: return stream_panels<BITS, 32, true, 1>(w, p0, p1, x, out, ldo, add);
    case 2: return stream_panels<BITS, 32, true, 2>(w, p0, p1, x, out, ldo, add);
    case 3: return stream_panels<BITS, 32, true, 3>(w, p0, p1, x, out, ldo, add);
    case 4: return stream_panels<BITS, 32, true, 4>(w, p0, p1, x, out, ldo, add);
    case 5: return stream_panels<BITS, 32, true, 5>(w, p0, p1, x, out, ldo, add);
    default: return stream_panels<BITS, 32, true, 6>(w, p0, p1, x, out, ldo, add);
  }
}

// Formats that recipes make. Up to a tile of tokens weights are streamed; up to a few tiles, a panel pair is streamed
// for each tile, from memory for the first and from L1 for the others; beyond that unpacking them first pays.
template <int BITS>
void usual(const Packed& w, int p0, int p1, const QuantRows& x, int m, float* out, size_t ldo, bool add) {
  if (m <= kTile) return stream_tokens<BITS>(w, p0, p1, x, m, out, ldo, add);
  if (m > kStreamed) return blocked<BITS, 32, true>(w, p0, p1, x, m, out, ldo, add);
  const int tiles = (m + kTile - 1) / kTile;
  for (int p = p0; p < p1; p += 2)
    for (int i = 0; i < tiles; i++) {
      const int t = m * i / tiles, end = m * (i + 1) / tiles;
      stream_tokens<BITS>(w, p, std::min(p + 2, p1), from_token(x, t), end - t, out + t * ldo, ldo, add);
    }
}

// The rest (other groups, minimums): streamed for one token, blocked otherwise, which keeps the program small.
template <int BITS, bool SYMMETRIC>
void by_group(const Packed& w, int p0, int p1, const QuantRows& x, int m, float* out, size_t ldo, bool add) {
  if (m > 1 && w.format.group == 16) return blocked<BITS, 16, SYMMETRIC>(w, p0, p1, x, m, out, ldo, add);
  if (m > 1) return blocked<BITS, 32, SYMMETRIC>(w, p0, p1, x, m, out, ldo, add);
  switch (w.format.group) {
    case 16: return stream_panels<BITS, 16, SYMMETRIC, 1>(w, p0, p1, x, out, ldo, add);
    case 32: return stream_panels<BITS, 32, SYMMETRIC, 1>(w, p0, p1, x, out, ldo, add);
    case 64: return stream_panels<BITS, 64, SYMMETRIC, 1>(w, p0, p1, x, out, ldo, add);
    default: return stream_panels<BITS, 128, SYMMETRIC, 1>(w, p0, p1, x, out, ldo, add);
  }
}

template <int BITS>
void by_symmetry(const Packed& w, int p0, int p1, const QuantRows& x, int m, float* out, size_t ldo, bool add) {
  if (w.format.symmetric && w.format.group == 32)
    usual<BITS>(w, p0, p1, x, m, out, ldo, add);
  else if (w.format.symmetric)
    by_group<BITS, true>(w, p0, p1, x, m, out, ldo, add);
  else
    by_group<BITS, false>(w, p0, p1, x, m, out, ldo, add);
}

template <int BITS>
void unpack_whole(const PackedFormat& format, const uint8_t* block, uint8_t* out, size_t stride) {
  for (int j = 0; j < format.group / 8; j++) {
    __m512i first, second;
    unpack8<BITS>(block, format.group, j, first, second);
    _mm512_storeu_si512(out + 2 * j * stride, first);
    _mm512_storeu_si512(out + (2 * j + 1) * stride, second);
  }
}

}  // namespace

void linear_int(const Packed& w, int p0, int p1, const QuantRows& x, int m, float* out, size_t ldo, bool add) {
  switch (w.format.bits) {
    case 4: return by_symmetry<4>(w, p0, p1, x, m, out, ldo, add);
    case 5: return by_symmetry<5>(w, p0, p1, x, m, out, ldo, add);
    case 6: return by_symmetry<6>(w, p0, p1, x, m, out, ldo, add);
    default: return by_symmetry<8>(w, p0, p1, x, m, out, ldo, add);
  }
}

void unpack_block(const PackedFormat& format, const uint8_t* block, uint8_t* out, size_t stride) {
  switch (format.bits) {
    case 4: return unpack_whole<4>(format, block, out, stride);
    case 5: return unpack_whole<5>(format, block, out, stride);
    case 6: return unpack_whole<6>(format, block, out, stride);
    default: return unpack_whole<8>(format, block, out, stride);
  }
}

}  // namespace hasten::avx512
