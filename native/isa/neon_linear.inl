// Integer linear layers on 64-bit ARM, for files that are each compiled for one instruction set. Few tokens: weights
// stream from memory. Many tokens: a panel is unpacked into L1 once and multiplied with tiles of 4 tokens. Sums are
// those of the other instruction sets to the bit: exact integers, then one multiply-add a group in the same order.
//
// A panel's 16 rows are four registers, "quarters", of [4 rows][4 inputs]. SDOT adds four products to each 32-bit lane;
// without it, products are added in pairs of 16 bits first. SMMLA multiplies two rows of eight inputs with those of two
// tokens: where a processor has it, unpacked weights lie that way.
#include <arm_neon.h>

#include <algorithm>

#include "isa/int_step.inl"
#include "isa/kernels.h"
#include "isa/repeat.h"

namespace hasten::neon {
namespace {

constexpr int kTile = 4;         // tokens a tile: 16 registers of integer sums
constexpr int kTokenBlock = 64;  // tokens whose activations stay in L2 while panels pass by
constexpr int kDepth = 1024;     // inputs unpacked at a time: 16 KB of weights
constexpr int kAhead = 2304;     // bytes that are asked for before they are needed, where prefetch is on

inline void store(float* out, float32x4_t value, bool add) {
  vst1q_f32(out, add ? vaddq_f32(vld1q_f32(out), value) : value);
}

inline float32x4_t load_scales(const uint8_t* scales) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(scales))));
}

// Four steps of 4 inputs of a quarter, or after pair_rows() four registers of [2 rows][8 inputs].
using Sixteen = int8x16_t[4];

// 16 bits as 16 bytes of 0 or 16.
inline uint8x16_t sixteen_by_bit(const uint8_t* bits) {
  const uint8x16_t spread = vcombine_u8(vdup_n_u8(bits[0]), vdup_n_u8(bits[1]));
  const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
  return vandq_u8(vtstq_u8(spread, bit), vdupq_n_u8(16));
}

// Inputs 16i .. 16i+15 of quarter r of a block: the unsigned values, or of 8-bit weights the signed ones.
template <int BITS>
inline void unpack16(const uint8_t* block, int group, int i, int r, Sixteen& out) {
  uint8x16_t u[4];
  if constexpr (BITS == 8) {
    for (int s = 0; s < 4; s++) u[s] = veorq_u8(vld1q_u8(block + 256 * i + 64 * s + 16 * r), vdupq_n_u8(0x80));
  } else {
    for (int j = 0; j < 2; j++) {
      const uint8x16_t nibbles = vld1q_u8(block + 128 * i + 64 * j + 16 * r);
      u[2 * j] = vandq_u8(nibbles, vdupq_n_u8(15));
      u[2 * j + 1] = vshrq_n_u8(nibbles, 4);
    }
  }
  if constexpr (BITS == 5)
    for (int s = 0; s < 4; s++) u[s] = vorrq_u8(u[s], sixteen_by_bit(block + 8 * group + 32 * i + 8 * s + 2 * r));
  if constexpr (BITS == 6) {
    const uint8x16_t plane = vld1q_u8(block + 8 * group + 64 * i + 16 * r);
    const uint8x16_t high[4] = {vshlq_n_u8(plane, 4), vshlq_n_u8(plane, 2), plane, vshrq_n_u8(plane, 2)};
    for (int s = 0; s < 4; s++) u[s] = vorrq_u8(u[s], vandq_u8(high[s], vdupq_n_u8(0x30)));
  }
  for (int s = 0; s < 4; s++) out[s] = vreinterpretq_s8_u8(u[s]);
}

// sum[row] += w[row][0..3] . inputs 4 * LANE .. 4 * LANE + 3 of q
template <int LANE>
inline int32x4_t dot4(int32x4_t sum, int8x16_t w, int8x16_t q) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_laneq_s32(sum, w, q, LANE);
#else
  const int8x16_t four = vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(q), LANE));
  const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(four)), high = vmull_high_s8(w, four);
  return vpadalq_s16(sum, vpaddq_s16(low, high));  // a pair is at most 2 * 128 * 127, which fits
#endif
}

inline int32x4_t dot16(int32x4_t sum, const Sixteen& w, int8x16_t q) {
  return dot4<3>(dot4<2>(dot4<1>(dot4<0>(sum, w[0], q), w[1], q), w[2], q), w[3], q);
}

// Adds a step's integer sums of one token and quarter to the float ones.
template <bool SYMMETRIC>
inline float32x4_t add_step(float32x4_t sum, int32x4_t dot, float32x4_t scale, float32x4_t minimum, float act,
                            int nsum) {
  sum = vfmaq_f32(sum, vcvtq_f32_s32(dot), vmulq_n_f32(scale, act));
  return SYMMETRIC ? sum : vfmaq_n_f32(sum, minimum, act * static_cast<float>(-nsum));
}

// M tokens and one panel over the whole depth, weights taken straight from the packed blocks. AHEAD: with software
// prefetch.
template <int BITS, int STEP, bool SYMMETRIC, bool AHEAD, int M>
void stream_panel(const Packed& w, int p, const QuantRows& x, float* out, size_t ldo, bool add) {
  const int group = w.format.group, block_bytes = w.format.block_bytes(), depth = w.padded_cols();
  const uint8_t* block = w.panel(p);
  const uint8_t* scales = block + w.format.quant_bytes();
  float32x4_t sum[M][4] = {};
  for (int k0 = 0; k0 < depth; k0 += group, block += block_bytes, scales += block_bytes) {
    if constexpr (AHEAD)
      for (int line = 0; line < block_bytes; line += 64) __builtin_prefetch(block + kAhead + line);
    for (int s = 0; s < group; s += STEP) {
      const Step<STEP> step(x, 0, k0 + s);
      int8x16_t q[M][STEP / 16];
      repeat<M>(HASTEN_EACH(m) { repeat<STEP / 16>(HASTEN_EACH(i) { q[m][i] = vld1q_s8(step.inputs(m, 16 * i)); }); });
      repeat<4>(HASTEN_EACH(r) {
        int32x4_t dot[M];
        repeat<M>(HASTEN_EACH(m) { dot[m] = vdupq_n_s32(int_start<BITS, SYMMETRIC>(step.nsum_of(m))); });
        repeat<STEP / 16>(HASTEN_EACH(i) {
          Sixteen weights;
          unpack16<BITS>(block, group, s / 16 + i, r, weights);
          repeat<M>(HASTEN_EACH(m) { dot[m] = dot16(dot[m], weights, q[m][i]); });
        });
        const float32x4_t scale = load_scales(scales + 8 * r);
        const float32x4_t minimum = SYMMETRIC ? vdupq_n_f32(0) : load_scales(scales + 32 + 8 * r);
        repeat<M>(HASTEN_EACH(m) {
          sum[m][r] = add_step<SYMMETRIC>(sum[m][r], dot[m], scale, minimum, step.scale_of(m), step.nsum_of(m));
        });
      });
    }
  }
  repeat<M>(
      HASTEN_EACH(m) { repeat<4>(HASTEN_EACH(r) { store(out + m * ldo + p * kPanelRows + 4 * r, sum[m][r], add); }); });
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
  alignas(64) int8_t w[kDepth * 16];          // per 16 inputs, per quarter: Sixteen
  alignas(64) float scale[kDepth / 16 * 16];  // per step: 16 rows
  alignas(64) float minimum[kDepth / 16 * 16];
  alignas(64) float partial[kTokenBlock * 16];  // sums over the pieces of the depth so far
};

Unpacked& scratch() {
  static thread_local Unpacked unpacked;
  return unpacked;
}

// Dots of M tokens and a panel's quarters.
template <int M>
using Dots = int32x4_t[M][4];

#if defined(__ARM_FEATURE_MATMUL_INT8)

// [4 rows][4 inputs] of four steps as rows 0 and 1, then 2 and 3, of the first eight inputs; then of the other eight.
inline void pair_rows(Sixteen& w) {
  const int32x4_t s[4] = {vreinterpretq_s32_s8(w[0]), vreinterpretq_s32_s8(w[1]), vreinterpretq_s32_s8(w[2]),
                          vreinterpretq_s32_s8(w[3])};
  w[0] = vreinterpretq_s8_s32(vzip1q_s32(s[0], s[1]));
  w[1] = vreinterpretq_s8_s32(vzip2q_s32(s[0], s[1]));
  w[2] = vreinterpretq_s8_s32(vzip1q_s32(s[2], s[3]));
  w[3] = vreinterpretq_s8_s32(vzip2q_s32(s[2], s[3]));
}

// The integer sums of M tokens over a step, two tokens at a time: the last of an odd number is paired with itself.
template <int BITS, bool SYMMETRIC, int STEP, int M>
inline void dot_tile(const Step<STEP>& x, const int8_t* w, Dots<M>& dot) {
  constexpr int kPairs = (M + 1) / 2;
  int32x4_t sum[kPairs][4][2];  // [pair][quarter][first or last two rows]: [2 tokens][2 rows]
  const auto second = [](int pair) { return std::min(2 * pair + 1, M - 1); };
  repeat<kPairs>(HASTEN_EACH(t) {
    const int a = int_start<BITS, SYMMETRIC>(x.nsum_of(2 * t)), b = int_start<BITS, SYMMETRIC>(x.nsum_of(second(t)));
    repeat<4>(HASTEN_EACH(r) { sum[t][r][0] = sum[t][r][1] = vcombine_s32(vdup_n_s32(a), vdup_n_s32(b)); });
  });
  repeat<STEP / 16>(HASTEN_EACH(i) {
    int8x16_t low[kPairs], high[kPairs];
    repeat<kPairs>(HASTEN_EACH(t) {
      const int64x2_t a = vreinterpretq_s64_s8(vld1q_s8(x.inputs(2 * t, 16 * i)));
      const int64x2_t b = vreinterpretq_s64_s8(vld1q_s8(x.inputs(second(t), 16 * i)));
      low[t] = vreinterpretq_s8_s64(vzip1q_s64(a, b));
      high[t] = vreinterpretq_s8_s64(vzip2q_s64(a, b));
    });
    repeat<4>(HASTEN_EACH(r) {
      const int8_t* at = w + 256 * i + 64 * r;
      repeat<2>(HASTEN_EACH(h) {
        const int8x16_t first = vld1q_s8(at + 16 * h), last = vld1q_s8(at + 32 + 16 * h);
        repeat<kPairs>(
            HASTEN_EACH(t) { sum[t][r][h] = vmmlaq_s32(vmmlaq_s32(sum[t][r][h], low[t], first), high[t], last); });
      });
    });
  });
  repeat<M>(HASTEN_EACH(m) {
    repeat<4>(HASTEN_EACH(r) {
      const int64x2_t a = vreinterpretq_s64_s32(sum[m / 2][r][0]), b = vreinterpretq_s64_s32(sum[m / 2][r][1]);
      dot[m][r] = vreinterpretq_s32_s64(m % 2 == 0 ? vzip1q_s64(a, b) : vzip2q_s64(a, b));
    });
  });
}

#else

inline void pair_rows(Sixteen&) {}

// The integer sums of M tokens over a step.
template <int BITS, bool SYMMETRIC, int STEP, int M>
inline void dot_tile(const Step<STEP>& x, const int8_t* w, Dots<M>& dot) {
  repeat<M>(HASTEN_EACH(m) {
    repeat<4>(HASTEN_EACH(r) { dot[m][r] = vdupq_n_s32(int_start<BITS, SYMMETRIC>(x.nsum_of(m))); });
  });
  repeat<STEP / 16>(HASTEN_EACH(i) {
    int8x16_t q[M];
    repeat<M>(HASTEN_EACH(m) { q[m] = vld1q_s8(x.inputs(m, 16 * i)); });
    repeat<4>(HASTEN_EACH(r) {
      const int8_t* at = w + 256 * i + 64 * r;
      const Sixteen weights = {vld1q_s8(at), vld1q_s8(at + 16), vld1q_s8(at + 32), vld1q_s8(at + 48)};
      repeat<M>(HASTEN_EACH(m) { dot[m][r] = dot16(dot[m][r], weights, q[m]); });
    });
  });
}

#endif

template <int BITS>
void unpack_panel(const Packed& w, int p, int k0, int depth, int step, Unpacked& out) {
  const int group = w.format.group, block_bytes = w.format.block_bytes();
  const uint8_t* block = w.panel(p) + static_cast<size_t>(k0 / group) * block_bytes;
  for (int k = 0; k < depth; k += group, block += block_bytes)
    for (int r = 0; r < 4; r++) {
      for (int i = 0; i < group / 16; i++) {
        Sixteen weights;
        unpack16<BITS>(block, group, i, r, weights);
        pair_rows(weights);
        for (int s = 0; s < 4; s++) vst1q_s8(out.w + (k + 16 * i) * 16 + 64 * r + 16 * s, weights[s]);
      }
      const uint8_t* scales = block + w.format.quant_bytes() + 8 * r;
      for (int s = 0; s < group; s += step) {
        const int at = (k + s) / step * 16 + 4 * r;
        vst1q_f32(out.scale + at, load_scales(scales));
        if (!w.format.symmetric) vst1q_f32(out.minimum + at, load_scales(scales + 32));
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

// M tokens and a panel over a piece. The float sums wait on the stack: the registers are full.
template <int BITS, int STEP, bool SYMMETRIC, int M>
void block_tile(const Piece& piece, int t) {
  float* partial = piece.w->partial + (t - piece.t0) * 16;
  float32x4_t sum[M][4];
  repeat<M>(HASTEN_EACH(m) {
    repeat<4>(HASTEN_EACH(r) { sum[m][r] = piece.first ? vdupq_n_f32(0) : vld1q_f32(partial + 16 * m + 4 * r); });
  });
  const float *scale = piece.w->scale, *minimum = piece.w->minimum;
  const int8_t* w = piece.w->w;
  Step<STEP> step(*piece.x, t, piece.k0);
  for (int k = 0, depth = piece.depth; k < depth; k += STEP, w += STEP * 16, scale += 16, minimum += 16) {
    Dots<M> dot;
    dot_tile<BITS, SYMMETRIC>(step, w, dot);
    repeat<M>(HASTEN_EACH(m) {
      repeat<4>(HASTEN_EACH(r) {
        const float32x4_t low = SYMMETRIC ? vdupq_n_f32(0) : vld1q_f32(minimum + 4 * r);
        sum[m][r] =
            add_step<SYMMETRIC>(sum[m][r], dot[m][r], vld1q_f32(scale + 4 * r), low, step.scale_of(m), step.nsum_of(m));
      });
    });
    step.to_next(k);
  }
  repeat<M>(HASTEN_EACH(m) {
    repeat<4>(HASTEN_EACH(r) {
      if (piece.last)
        store(piece.out + (t + m) * piece.ldo + 4 * r, sum[m][r], piece.add);
      else
        vst1q_f32(partial + 16 * m + 4 * r, sum[m][r]);
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

template <int BITS, int STEP, bool SYMMETRIC>
void blocked(const Packed& w, int p0, int p1, const QuantRows& x, int m, float* out, size_t ldo, bool add) {
  Unpacked& unpacked = scratch();
  const int depth = w.padded_cols();
  for (int t0 = 0; t0 < m; t0 += kTokenBlock)
    for (int p = p0; p < p1; p++)
      for (int k0 = 0; k0 < depth; k0 += kDepth) {
        const int here = std::min(kDepth, depth - k0);
        unpack_panel<BITS>(w, p, k0, here, STEP, unpacked);
        const Piece piece{&unpacked, &x, k0, here, k0 == 0, k0 + here == depth, add, t0, out + p * kPanelRows, ldo};
        block_tiles<BITS, STEP, SYMMETRIC>(piece, std::min(m, t0 + kTokenBlock));
      }
}

enum class How { kStream, kStreamAhead, kBlocked };

template <How HOW, int BITS, int STEP, bool SYMMETRIC>
void by_way(const Packed& w, int p0, int p1, const QuantRows& x, int m, float* out, size_t ldo, bool add) {
  if constexpr (HOW == How::kBlocked)
    blocked<BITS, STEP, SYMMETRIC>(w, p0, p1, x, m, out, ldo, add);
  else
    stream<BITS, STEP, SYMMETRIC, HOW == How::kStreamAhead>(w, p0, p1, x, m, out, ldo, add);
}

template <How HOW, int BITS>
void by_format(const Packed& w, int p0, int p1, const QuantRows& x, int m, float* out, size_t ldo, bool add) {
  const bool small = w.format.group == 16;
  if (w.format.symmetric)
    (small ? by_way<HOW, BITS, 16, true> : by_way<HOW, BITS, 32, true>)(w, p0, p1, x, m, out, ldo, add);
  else
    (small ? by_way<HOW, BITS, 16, false> : by_way<HOW, BITS, 32, false>)(w, p0, p1, x, m, out, ldo, add);
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
}  // namespace hasten::neon
