// Integer linear layers on AVX512-VNNI. Few tokens: weights stream from memory straight into VPDPBUSD on the unsigned
// values, the zero point folded into the accumulator's start through -sum(q). Many tokens: a panel pair is unpacked
// into L1 once and multiplied with tiles of 6 tokens x 32 rows. How many panels are streamed side by side, and whether
// software prefetch helps, differs between processors: each is a way of its own.
#include <algorithm>
#include <vector>

#include "isa/avx512.h"
#include "isa/avx512_unpack.inl"
#include "isa/repeat.h"

namespace hasten::avx512 {
namespace {

constexpr int kTile = 6;          // tokens a tile: 12 int and 12 float accumulators of the 32 registers
constexpr int kTokenBlock = 192;  // tokens whose activations stay in L2 while panels pass by
constexpr int kAhead = 2304;      // bytes each stream is asked for before it is needed, where prefetch is on
constexpr int kDepth = 1024;      // inputs unpacked at a time: 32 KB of weights for a panel pair
#ifdef HASTEN_SANITIZED
constexpr int kWideTile = 3;  // large tiles compile slowly under the sanitizers
#else
constexpr int kWideTile = 8;  // tokens that one pass over a pair of panels serves, some of their sums on the stack
#endif

inline void store(float* out, __m512 value, bool add) {
  _mm512_storeu_ps(out, add ? _mm512_add_ps(_mm512_loadu_ps(out), value) : value);
}

template <int BYTES>
[[gnu::always_inline]] inline void prefetch(const uint8_t* block) {
  repeat<(BYTES + 63) / 64>(
      HASTEN_EACH(line) { _mm_prefetch(reinterpret_cast<const char*>(block) + 64 * line, _MM_HINT_T0); });
}

// What a streaming kernel is made for. STEP: inputs that share a weight scale and an activation scale, 16 or 32. ONE: a
// block is one step, so that every offset is a constant. AHEAD: with software prefetch.
template <int BITS_, int STEP_, bool SYMMETRIC_, bool ONE_, bool AHEAD_>
struct Stream {
  static constexpr int BITS = BITS_, STEP = STEP_;
  static constexpr bool SYMMETRIC = SYMMETRIC_, ONE = ONE_, AHEAD = AHEAD_;
  static constexpr int kLow = (BITS == 8 ? 16 : 8) * STEP;                       // bytes of a step's low plane
  static constexpr int kHigh = BITS == 5 ? 2 * STEP : BITS == 6 ? 4 * STEP : 0;  // and of its high plane
  static constexpr int kScales = SYMMETRIC ? 32 : 64;
  using Plain = Stream<BITS, STEP, SYMMETRIC, ONE, false>;  // for the last panels of a matrix, which are few
};

// M tokens x R panels over the whole depth, weights taken straight from the packed blocks. SHIFTED: the sums of x were
// multiplied by the zero point before.
template <typename S, int M, int R, bool SHIFTED = false>
void stream_tile(const Packed& w, int p, const QuantRows& x, float* out, size_t ldo, bool add) {
  constexpr int STEP = S::STEP;
  // One token and one panel would be one chain of sums; two chains, added at the end, are the same integer sooner.
  constexpr int kChains = M * R <= 2 ? 2 : 1;
  const int group = S::ONE ? STEP : w.format.group, steps = S::ONE ? 1 : group / STEP;
  const int high0 = 8 * group, scales0 = 2 * S::BITS * group, block_bytes = scales0 + S::kScales;
  const uint8_t* panel[R];
  repeat<R>(HASTEN_EACH(r) { panel[r] = w.panel(p + r); });
  const size_t cols = x.cols;
  constexpr int kThirds = (M + 2) / 3;  // every third token's row: the two after it are within reach of an address
  const int8_t* q[kThirds];
  const float* act[kThirds];
  const int32_t* nsum[kThirds];
  const size_t acts = cols / 32, sums = cols / STEP;
  repeat<kThirds>(HASTEN_EACH(i) {
    q[i] = x.q + 3 * i * cols;
    act[i] = x.scale + 3 * i * acts;
    nsum[i] = (STEP == 16 ? x.nsum16 : x.nsum) + 3 * i * sums;
  });
  // Near the end of a panel the next bytes are those of panel p + R: this one's neighbours are being read already.
  const size_t jump = (R - 1) * w.format.panel_bytes(w.cols);
  const int blocks = w.padded_cols() / group, last_blocks = kAhead / block_bytes + 1;
  __m512 sum[R][M];
  repeat<R>(HASTEN_EACH(r) { repeat<M>(HASTEN_EACH(m) { sum[r][m] = _mm512_setzero_ps(); }); });
  for (int b = 0, i = 0; b < blocks; b++) {
    const size_t ahead = kAhead + (b + last_blocks < blocks ? 0 : jump);
    for (int s = 0; s < steps; s++, i++) {
      if constexpr (S::AHEAD)
        repeat<R>(HASTEN_EACH(r) {
          prefetch<2 * S::BITS * STEP + (S::ONE ? S::kScales : 0)>(panel[r] + s * 2 * S::BITS * STEP + ahead);
        });
      __m512i dot[kChains][R][M];
      repeat<M>(HASTEN_EACH(m) {
        __m512i start = _mm512_setzero_si512();
        if constexpr (S::SYMMETRIC) start = _mm512_set1_epi32(nsum[m / 3][m % 3 * sums]);
        if constexpr (S::SYMMETRIC && !SHIFTED) start = _mm512_slli_epi32(start, S::BITS - 1);
        repeat<R>(HASTEN_EACH(r) { dot[0][r][m] = start; });
        if constexpr (kChains == 2) repeat<R>(HASTEN_EACH(r) { dot[1][r][m] = _mm512_setzero_si512(); });
      });
      repeat<STEP / 8>(HASTEN_EACH(j) {
        __m512i first[R], second[R];
        repeat<R>(HASTEN_EACH(r) {
          unpack8<S::BITS>(panel[r] + s * S::kLow, panel[r] + high0 + s * S::kHigh, j, first[r], second[r]);
        });
        repeat<M>(HASTEN_EACH(m) {
          const int8_t* at = q[m / 3] + (m % 3) * cols + 8 * j;
          if constexpr (R == 1) {
            dot[0][0][m] = dot_broadcast(dot[0][0][m], first[0], at);
            dot[kChains - 1][0][m] = dot_broadcast(dot[kChains - 1][0][m], second[0], at + 4);
          } else {
            const __m512i a = broadcast4(at), c = broadcast4(at + 4);
            repeat<R>(HASTEN_EACH(r) { dot[0][r][m] = _mm512_dpbusd_epi32(dot[0][r][m], first[r], a); });
            repeat<R>(
                HASTEN_EACH(r) { dot[kChains - 1][r][m] = _mm512_dpbusd_epi32(dot[kChains - 1][r][m], second[r], c); });
          }
        });
      });
      repeat<R>(HASTEN_EACH(r) {
        const __m512 scale = load_scales(panel[r] + scales0);
        repeat<M>(HASTEN_EACH(m) {
          const float a = act[m / 3][m % 3 * acts];
          if constexpr (kChains == 2) dot[0][r][m] = _mm512_add_epi32(dot[0][r][m], dot[1][r][m]);
          sum[r][m] =
              _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[0][r][m]), _mm512_mul_ps(scale, _mm512_set1_ps(a)), sum[r][m]);
          if constexpr (!S::SYMMETRIC) {
            const float total = a * static_cast<float>(-nsum[m / 3][m % 3 * sums]);
            sum[r][m] = _mm512_fmadd_ps(load_scales(panel[r] + scales0 + 32), _mm512_set1_ps(total), sum[r][m]);
          }
        });
      });
      repeat<kThirds>(HASTEN_EACH(n) {
        q[n] += STEP;
        act[n] += STEP == 16 ? i % 2 : 1;
        nsum[n]++;
      });
    }
    repeat<R>(HASTEN_EACH(r) { panel[r] += block_bytes; });
  }
  repeat<R>(
      HASTEN_EACH(r) { repeat<M>(HASTEN_EACH(m) { store(out + m * ldo + (p + r) * kPanelRows, sum[r][m], add); }); });
}

// Tokens of a tile: what the pair of panels has registers for. Formats with longer groups or minimums have fewer
// variants, which keeps the program small.
template <typename S, int R>
#ifdef HASTEN_SANITIZED
constexpr int kMostTokens =
    R == 4 ? 1 : 2;  // fewer variants of the same code: under the sanitizers they compile slowly
#else
constexpr int kMostTokens = R == 4                   ? 1
                            : S::ONE && S::SYMMETRIC ? 6
                                                     : 4;
#endif

// stream_tile of `m` tokens, a run-time number from 1 to kMostTokens.
template <typename S, int R, int M = kMostTokens<S, R>>
void stream_tokens(const Packed& w, int p, const QuantRows& x, int m, float* out, size_t ldo, bool add) {
  if constexpr (M > 1)
    if (m < M) return stream_tokens<S, R, M - 1>(w, p, x, m, out, ldo, add);
  stream_tile<S, M, R>(w, p, x, out, ldo, add);
}

// The activations of m tokens with their sums multiplied by the zero point, in memory of this thread that the next
// call takes again: one shift a step less where eight tokens leave none of the multipliers idle.
template <typename S>
QuantRows shifted(const QuantRows& x, int m) {
  static thread_local std::vector<int32_t> products;
  const size_t n = static_cast<size_t>(m) * x.cols / S::STEP;
  products.resize(std::max(products.size(), n));
  const int32_t* nsum = S::STEP == 16 ? x.nsum16 : x.nsum;
  for (size_t i = 0; i < n; i++) products[i] = nsum[i] * (1 << (S::BITS - 1));
  return {x.q, x.scale, products.data(), products.data(), x.cols};
}

// R panels at a time; more tokens than there are registers for are taken in equal tiles, the first of which reads the
// panels from memory and the others from L1. WIDE: eight tokens at a time first.
template <typename S, int R, bool WIDE = false>
void stream(const Packed& w, int p0, int p1, const QuantRows& x, int m, float* out, size_t ldo, bool add) {
  if constexpr (R > 2)
    if (m > 1) return stream<S, 2>(w, p0, p1, x, m, out, ldo, add);
  const int first = WIDE ? m / kWideTile * kWideTile : 0, rest = m - first;
  const int tiles = (rest + kMostTokens<S, R> - 1) / kMostTokens<S, R>;
  const QuantRows wide = WIDE && S::SYMMETRIC && first > 0 ? shifted<S>(x, first) : x;
  int p = p0;
  for (; p + R <= p1; p += R) {
    if constexpr (WIDE)
      for (int t = 0; t < first; t += kWideTile)
        stream_tile<S, kWideTile, R, S::SYMMETRIC>(w, p, from_token(wide, t), out + t * ldo, ldo, add);
    for (int i = 0; i < tiles; i++) {
      const int t = first + rest * i / tiles, end = first + rest * (i + 1) / tiles;
      stream_tokens<S, R>(w, p, from_token(x, t), end - t, out + t * ldo, ldo, add);
    }
  }
  if constexpr (R > 1)
    if (p < p1) stream<typename S::Plain, R / 2>(w, p, p1, x, m, out, ldo, add);
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
        unpack8<BITS>(block, block + 8 * group, j, first, second);
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

// Tiles of nearly the same size: eight tokens are 4 + 4, not 6 + 2, whose second tile would wait for its own sums.
template <int STEP, bool SYMMETRIC, int R>
void block_tiles(const Tile& tile, int t0, int t1) {
  const int tokens = t1 - t0, tiles = (tokens + kTile - 1) / kTile;
  for (int i = 0; i < tiles; i++) {
    const int t = t0 + tokens * i / tiles;
    switch (t0 + tokens * (i + 1) / tiles - t) {
      case 6: block_tile<STEP, SYMMETRIC, R, 6>(tile, t); break;
      case 5: block_tile<STEP, SYMMETRIC, R, 5>(tile, t); break;
      case 4: block_tile<STEP, SYMMETRIC, R, 4>(tile, t); break;
      case 3: block_tile<STEP, SYMMETRIC, R, 3>(tile, t); break;
      case 2: block_tile<STEP, SYMMETRIC, R, 2>(tile, t); break;
      default: block_tile<STEP, SYMMETRIC, R, 1>(tile, t);
    }
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

enum class How { kOne, kTwo, kTwoAhead, kTwoWide, kFourAhead, kBlocked };

template <How HOW, int BITS, int STEP, bool SYMMETRIC, bool ONE>
void by_way(const Packed& w, int p0, int p1, const QuantRows& x, int m, float* out, size_t ldo, bool add) {
  // Formats that recipes make (groups of 32, symmetric) have every way. For the others a pair of panels always comes
  // with prefetch.
  constexpr bool kAheadToo = HOW == How::kTwoAhead || HOW == How::kTwoWide || HOW == How::kFourAhead ||
                             (HOW == How::kTwo && !(ONE && SYMMETRIC));
  constexpr int R = HOW == How::kOne ? 1 : HOW == How::kFourAhead ? 4 : 2;
  if constexpr (HOW == How::kBlocked)
    blocked<BITS, STEP, SYMMETRIC>(w, p0, p1, x, m, out, ldo, add);
  else
    for (int t = 0; t < m; t += kTokenBlock)
      stream<Stream<BITS, STEP, SYMMETRIC, ONE, kAheadToo>, R, HOW == How::kTwoWide>(
          w, p0, p1, from_token(x, t), std::min(kTokenBlock, m - t), out + t * ldo, ldo, add);
}

template <How HOW, int BITS>
void by_format(const Packed& w, int p0, int p1, const QuantRows& x, int m, float* out, size_t ldo, bool add) {
  const bool small = w.format.group == 16;
  if (w.format.symmetric && w.format.group == 32)
    return by_way<HOW, BITS, 32, true, true>(w, p0, p1, x, m, out, ldo, add);
  if constexpr (BITS <= 5)  // w4-asym, and files' Q4_1, Q5_1, Q4_K and Q5_K
    if (w.format.group == 32) return by_way<HOW, BITS, 32, false, true>(w, p0, p1, x, m, out, ldo, add);
  if (w.format.symmetric)
    (small ? by_way<HOW, BITS, 16, true, false> : by_way<HOW, BITS, 32, true, false>)(w, p0, p1, x, m, out, ldo, add);
  else
    (small ? by_way<HOW, BITS, 16, false, false> : by_way<HOW, BITS, 32, false, false>)(w, p0, p1, x, m, out, ldo, add);
}

template <How HOW>
void by_bits(const Packed& w, int p0, int p1, const QuantRows& x, int m, float* out, size_t ldo, bool add) {
  switch (w.format.bits) {
    case 4: return by_format<HOW, 4>(w, p0, p1, x, m, out, ldo, add);
    case 5: return by_format<HOW, 5>(w, p0, p1, x, m, out, ldo, add);
    case 6: return by_format<HOW, 6>(w, p0, p1, x, m, out, ldo, add);
    default: return by_format<HOW, 8>(w, p0, p1, x, m, out, ldo, add);
  }
}

template <int BITS>
void unpack_whole(const PackedFormat& format, const uint8_t* block, uint8_t* out, size_t stride) {
  for (int j = 0; j < format.group / 8; j++) {
    __m512i first, second;
    unpack8<BITS>(block, block + 8 * format.group, j, first, second);
    _mm512_storeu_si512(out + 2 * j * stride, first);
    _mm512_storeu_si512(out + (2 * j + 1) * stride, second);
  }
}

}  // namespace

// The last two numbers are those of tokens: above one token the way of four panels runs that of two with prefetch, and
// below eight the way of eight tokens does.
const IntWay kIntWays[6] = {{"avx512 one panel", 1, 1, kAnyTokens, by_bits<How::kOne>},
                            {"avx512 two panels", 2, 1, kAnyTokens, by_bits<How::kTwo>},
                            {"avx512 two panels, prefetch", 2, 1, kAnyTokens, by_bits<How::kTwoAhead>},
                            {"avx512 four panels, prefetch", 4, 1, 1, by_bits<How::kFourAhead>},
                            {"avx512 unpack", 2, 1, kAnyTokens, by_bits<How::kBlocked>},
                            {"avx512 two panels, eight tokens", 2, 8, kAnyTokens, by_bits<How::kTwoWide>}};

void unpack_block(const PackedFormat& format, const uint8_t* block, uint8_t* out, size_t stride) {
  switch (format.bits) {
    case 4: return unpack_whole<4>(format, block, out, stride);
    case 5: return unpack_whole<5>(format, block, out, stride);
    case 6: return unpack_whole<6>(format, block, out, stride);
    default: return unpack_whole<8>(format, block, out, stride);
  }
}

}  // namespace hasten::avx512
