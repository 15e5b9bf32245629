// Integer linear layers on AVX2, by VPMADDUBSW. Few tokens: weights stream from memory. Many tokens: a panel is
// unpacked into L1 once and multiplied with tiles of 4 tokens and both halves. Sums are those of the other instruction
// sets to the bit: exact integers, then one multiply-add a group in the same order.
#include <algorithm>

#include "isa/avx2.h"
#include "isa/avx2_unpack.inl"
#include "isa/int_step.inl"
#include "isa/repeat.h"

namespace hasten::avx2 {
namespace {

constexpr int kTile = 4;          // tokens a tile: 8 registers of 16-bit sums, the rest for weights
constexpr int kTokenBlock = 64;   // tokens whose activations stay in L2 while panels pass by
constexpr int kDepth = 1024;      // inputs unpacked at a time: 16 KB of weights
constexpr int kShortDepth = 128;  // the same for few tokens: a multiple of every group
constexpr int kAhead = 2304;      // bytes that are asked for before they are needed, where prefetch is on

inline void store(float* out, __m256 value, bool add) {
  _mm256_storeu_ps(out, add ? _mm256_add_ps(_mm256_loadu_ps(out), value) : value);
}

// Adds a step's integer sums to the float ones: scale is of one half, minimum too if there is one.
template <int STEP, bool SYMMETRIC, int M>
inline void add_step(const Step<STEP>& x, const __m256i (&dot)[M], __m256 scale, __m256 minimum, __m256 (&sum)[M]) {
  for (int m = 0; m < M; m++) {
    const float act = x.scale_of(m);
    sum[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[m]), _mm256_mul_ps(scale, _mm256_set1_ps(act)), sum[m]);
    if constexpr (!SYMMETRIC)
      sum[m] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(act * static_cast<float>(-x.nsum_of(m))), sum[m]);
  }
}

// The integer sums of one half over a step. unpack(j, first, second) gives the weights of 8 inputs.
template <int BITS, int STEP, bool SYMMETRIC, int M, typename Unpack>
inline void dot_step(const Step<STEP>& x, __m256i (&dot)[M], const Unpack& unpack) {
  for (int m = 0; m < M; m++) dot[m] = _mm256_set1_epi32(int_start<BITS, SYMMETRIC>(x.nsum_of(m)));
  constexpr int kRun = std::min(kSumsIn16<BITS>, STEP / 4);  // registers of 4 inputs summed in 16 bits
  __m256i pairs[M];
#pragma GCC unroll 8
  for (int j = 0; j < STEP / 8; j++) {
    __m256i u[2];
    unpack(j, u[0], u[1]);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      const Weights<BITS> weights(u[i]);
      const int place = (2 * j + i) % kRun;
      for (int m = 0; m < M; m++) {
        const __m256i products = weights.pairs(broadcast4(x.inputs(m, 8 * j + 4 * i)));
        pairs[m] = place == 0 ? products : add_in_order(pairs[m], products);
        if (place == kRun - 1) dot[m] = widen(dot[m], pairs[m]);
      }
    }
  }
}

// M tokens and one panel over the whole depth, weights taken straight from the packed blocks. AHEAD: with software
// prefetch.
template <int BITS, int STEP, bool SYMMETRIC, bool AHEAD, int M>
void stream_panel(const Packed& w, int p, const QuantRows& x, float* out, size_t ldo, bool add) {
  const int group = w.format.group, block_bytes = w.format.block_bytes(), depth = w.padded_cols();
  const uint8_t* block = w.panel(p);
  const uint8_t* scales = block + w.format.quant_bytes();
  __m256 sum[2][M];
  for (int h = 0; h < 2; h++)
    for (int m = 0; m < M; m++) sum[h][m] = _mm256_setzero_ps();
  for (int k0 = 0; k0 < depth; k0 += group, block += block_bytes, scales += block_bytes) {
    if constexpr (AHEAD)
      for (int line = 0; line < block_bytes; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(block) + kAhead + line, _MM_HINT_T0);
    for (int s = 0; s < group; s += STEP) {
      const Step<STEP> step(x, 0, k0 + s);
      for (int h = 0; h < 2; h++) {
        __m256i dot[M];
        dot_step<BITS, STEP, SYMMETRIC>(step, dot, [&](int j, __m256i& first, __m256i& second) {
          unpack8<BITS>(block, group, s / 8 + j, h, first, second);
        });
        const __m256 minimum = SYMMETRIC ? _mm256_setzero_ps() : load_scales(scales + 32 + 16 * h);
        add_step<STEP, SYMMETRIC>(step, dot, load_scales(scales + 16 * h), minimum, sum[h]);
      }
    }
  }
  for (int h = 0; h < 2; h++)
    for (int m = 0; m < M; m++) store(out + m * ldo + p * kPanelRows + 8 * h, sum[h][m], add);
}

// A panel is streamed for each tile of tokens, from memory for the first and from L1 for the others.
template <int BITS, int STEP, bool SYMMETRIC, bool AHEAD>
void stream(const Packed& w, int p0, int p1, const QuantRows& x, int m, float* out, size_t ldo, bool add) {
  const int tiles = (m + kTile - 1) / kTile;
  for (int p = p0; p < p1; p++)
    for (int i = 0; i < tiles; i++) {
      const int t = m * i / tiles;
      const QuantRows rows = from_token(x, t);
      float* to = out + t * ldo;
      switch (m * (i + 1) / tiles - t) {
        case 1: stream_panel<BITS, STEP, SYMMETRIC, AHEAD, 1>(w, p, rows, to, ldo, add); break;
        case 2: stream_panel<BITS, STEP, SYMMETRIC, AHEAD, 2>(w, p, rows, to, ldo, add); break;
        case 3: stream_panel<BITS, STEP, SYMMETRIC, false, 3>(w, p, rows, to, ldo, add); break;
        default: stream_panel<BITS, STEP, SYMMETRIC, false, 4>(w, p, rows, to, ldo, add);
      }
    }
}

// A panel's weights over some depth, unpacked.
struct Unpacked {
  alignas(64) uint8_t u[kDepth / 4 * 64];     // per 4 inputs: [16 rows][4]
  alignas(64) float scale[kDepth / 16 * 16];  // per step: 16 rows
  alignas(64) float minimum[kDepth / 16 * 16];
  alignas(64) float partial[kTokenBlock * 16];  // sums over the pieces of the depth so far
};

Unpacked& scratch() {
  static thread_local Unpacked unpacked;
  return unpacked;
}

template <int BITS, bool AHEAD>
void unpack_panel(const Packed& w, int p, int k0, int depth, int step, Unpacked& out) {
  const int group = w.format.group, block_bytes = w.format.block_bytes();
  const uint8_t* block = w.panel(p) + static_cast<size_t>(k0 / group) * block_bytes;
  for (int k = 0; k < depth; k += group, block += block_bytes) {
    if constexpr (AHEAD)
      for (int line = 0; line < block_bytes; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(block) + kAhead + line, _MM_HINT_T0);
    for (int h = 0; h < 2; h++) {
      for (int j = 0; j < group / 8; j++) {
        __m256i first, second;
        unpack8<BITS>(block, group, j, h, first, second);
        uint8_t* u = out.u + (k + 8 * j) * 16 + 32 * h;
        _mm256_store_si256(reinterpret_cast<__m256i*>(u), first);
        _mm256_store_si256(reinterpret_cast<__m256i*>(u + 64), second);
      }
      const uint8_t* scales = block + w.format.quant_bytes() + 16 * h;
      for (int s = 0; s < group; s += step) {
        const int at = (k + s) / step * 16 + 8 * h;
        _mm256_store_ps(out.scale + at, load_scales(scales));
        if (!w.format.symmetric) _mm256_store_ps(out.minimum + at, load_scales(scales + 32));
      }
    }
  }
}

struct Piece {
  Unpacked* w;
  const QuantRows* x;
  int k0, depth;
  bool first, last, add;  // of the pieces of the depth: sums start at zero with the first and reach `out` with the last
  int t0;                 // first token of the block
  float* out;
  size_t ldo;
};

template <int M>
using Dots = __m256i[M][2];  // of M tokens and both halves

// Adds to dot the products of RUN registers of 4 inputs, which may be summed in 16 bits. A broadcast of activations
// feeds both halves. Long runs keep the sums of all tokens in registers, short ones the weights.
template <int BITS, int RUN, int STEP, int M>
inline void dot_run(const Step<STEP>& x, int k, const uint8_t* u, Dots<M>& dot) {
  if constexpr (RUN > 2) {
    Dots<M> pairs;
    repeat<RUN>(HASTEN_EACH(i) {
      const Weights<BITS> low(load_bytes(u + 64 * i)), high(load_bytes(u + 64 * i + 32));
      repeat<M>(HASTEN_EACH(m) {
        const __m256i q = broadcast4(x.inputs(m, k + 4 * i));
        pairs[m][0] = i == 0 ? low.pairs(q) : add_in_order(pairs[m][0], low.pairs(q));
        pairs[m][1] = i == 0 ? high.pairs(q) : add_in_order(pairs[m][1], high.pairs(q));
      });
    });
    repeat<M>(HASTEN_EACH(m) { repeat<2>(HASTEN_EACH(h) { dot[m][h] = widen(dot[m][h], pairs[m][h]); }); });
  } else {
    const Weights<BITS> low(load_bytes(u)), high(load_bytes(u + 32));
    const uint8_t* next = RUN == 2 ? u + 64 : u;
    const Weights<BITS> next_low(load_bytes(next)), next_high(load_bytes(next + 32));
    repeat<M>(HASTEN_EACH(m) {
      const __m256i q = broadcast4(x.inputs(m, k));
      __m256i pairs[2] = {low.pairs(q), high.pairs(q)};
      if constexpr (RUN == 2) {
        const __m256i next_q = broadcast4(x.inputs(m, k + 4));
        pairs[0] = add_in_order(pairs[0], next_low.pairs(next_q));
        pairs[1] = add_in_order(pairs[1], next_high.pairs(next_q));
      }
      repeat<2>(HASTEN_EACH(h) { dot[m][h] = widen(dot[m][h], pairs[h]); });
    });
  }
}

// M tokens and both halves over a piece. Most of the float sums wait on the stack: the registers are full.
template <int BITS, int STEP, bool SYMMETRIC, int M>
void block_tile(const Piece& piece, int t) {
  constexpr int kRun = std::min(kSumsIn16<BITS>, STEP / 4);
  float* partial = piece.w->partial + (t - piece.t0) * 16;
  __m256 sum[M][2];
  repeat<M>(HASTEN_EACH(m) {
    repeat<2>(
        HASTEN_EACH(h) { sum[m][h] = piece.first ? _mm256_setzero_ps() : _mm256_load_ps(partial + 16 * m + 8 * h); });
  });
  const float *scale = piece.w->scale, *minimum = piece.w->minimum;
  const uint8_t* u = piece.w->u;
  Step<STEP> step(*piece.x, t, piece.k0);
  for (int k = 0, depth = piece.depth; k < depth; k += STEP, u += STEP * 16, scale += 16, minimum += 16) {
    Dots<M> dot;
    repeat<M>(
        HASTEN_EACH(m) { dot[m][0] = dot[m][1] = _mm256_set1_epi32(int_start<BITS, SYMMETRIC>(step.nsum_of(m))); });
    repeat<STEP / 4 / kRun>(HASTEN_EACH(i) { dot_run<BITS, kRun>(step, 4 * kRun * i, u + 64 * kRun * i, dot); });
    repeat<M>(HASTEN_EACH(m) {
      const float act = step.scale_of(m);
      repeat<2>(HASTEN_EACH(h) {
        const __m256 by = _mm256_mul_ps(_mm256_load_ps(scale + 8 * h), _mm256_set1_ps(act));
        sum[m][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[m][h]), by, sum[m][h]);
        if constexpr (!SYMMETRIC)
          sum[m][h] = _mm256_fmadd_ps(_mm256_load_ps(minimum + 8 * h),
                                      _mm256_set1_ps(act * static_cast<float>(-step.nsum_of(m))), sum[m][h]);
      });
    });
    step.to_next(k);
  }
  repeat<M>(HASTEN_EACH(m) {
    repeat<2>(HASTEN_EACH(h) {
      if (piece.last)
        store(piece.out + (t + m) * piece.ldo + 8 * h, sum[m][h], piece.add);
      else
        _mm256_store_ps(partial + 16 * m + 8 * h, sum[m][h]);
    });
  });
}

template <int BITS, int STEP, bool SYMMETRIC>
void block_tiles(const Piece& piece, int t1) {
  int t = piece.t0;
  for (; t + kTile <= t1; t += kTile) block_tile<BITS, STEP, SYMMETRIC, kTile>(piece, t);
  switch (t1 - t) {
    case 3: return block_tile<BITS, STEP, SYMMETRIC, 3>(piece, t);
    case 2: return block_tile<BITS, STEP, SYMMETRIC, 2>(piece, t);
    case 1: return block_tile<BITS, STEP, SYMMETRIC, 1>(piece, t);
    default: return;
  }
}

// AHEAD: for few tokens, whose weights come from memory. Short pieces, and with each of them a prefetch.
template <int BITS, int STEP, bool SYMMETRIC, bool AHEAD>
void blocked(const Packed& w, int p0, int p1, const QuantRows& x, int m, float* out, size_t ldo, bool add) {
  constexpr int kPiece = AHEAD ? kShortDepth : kDepth;
  Unpacked& unpacked = scratch();
  const int depth = w.padded_cols();
  for (int t0 = 0; t0 < m; t0 += kTokenBlock)
    for (int p = p0; p < p1; p++)
      for (int k0 = 0; k0 < depth; k0 += kPiece) {
        const int here = std::min(kPiece, depth - k0);
        unpack_panel<BITS, AHEAD>(w, p, k0, here, STEP, unpacked);
        const Piece piece{&unpacked, &x, k0, here, k0 == 0, k0 + here == depth, add, t0, out + p * kPanelRows, ldo};
        block_tiles<BITS, STEP, SYMMETRIC>(piece, std::min(m, t0 + kTokenBlock));
      }
}

enum class How { kStream, kStreamAhead, kBlocked, kBlockedAhead };

template <How HOW, int BITS, int STEP, bool SYMMETRIC>
constexpr auto kernel_of() {
  if constexpr (HOW == How::kBlocked || HOW == How::kBlockedAhead)
    return blocked < BITS, STEP, SYMMETRIC, HOW == How::kBlockedAhead > ;
  else
    return stream < BITS, STEP, SYMMETRIC, HOW == How::kStreamAhead > ;
}

template <How HOW, int BITS>
void by_format(const Packed& w, int p0, int p1, const QuantRows& x, int m, float* out, size_t ldo, bool add) {
  const bool small = w.format.group == 16;
  if (w.format.symmetric)
    (small ? kernel_of<HOW, BITS, 16, true>() : kernel_of<HOW, BITS, 32, true>())(w, p0, p1, x, m, out, ldo, add);
  else
    (small ? kernel_of<HOW, BITS, 16, false>() : kernel_of<HOW, BITS, 32, false>())(w, p0, p1, x, m, out, ldo, add);
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

}  // namespace

const IntWay kIntWays[4] = {{"avx2 stream", 1, 1, kAnyTokens, by_bits<How::kStream>},
                            {"avx2 stream, prefetch", 1, 1, kAnyTokens, by_bits<How::kStreamAhead>},
                            {"avx2 unpack", 1, 1, kAnyTokens, by_bits<How::kBlocked>},
                            {"avx2 unpack, prefetch", 1, 1, kAnyTokens, by_bits<How::kBlockedAhead>}};

}  // namespace hasten::avx2
