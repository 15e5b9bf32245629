// Integer linear layers on AVX2, by VPMADDUBSW. Few tokens: weights stream from memory. Many tokens: a panel is
// unpacked into L1 once and multiplied with tiles of 4 tokens. Sums are those of the other instruction sets to the bit:
// exact integers, then one multiply-add a group in the same order.
#include <algorithm>

#include "isa/avx2.h"
#include "isa/avx2_unpack.inl"

namespace hasten::avx2 {
namespace {

constexpr int kTile = 4;         // tokens a tile: 8 registers of 16-bit sums, the rest for weights
constexpr int kTokenBlock = 64;  // tokens whose activations stay in L2 while panels pass by
constexpr int kDepth = 1024;     // inputs unpacked at a time: 16 KB of weights
constexpr int kAhead = 2304;     // bytes that are asked for before they are needed, where prefetch is on

inline void store(float* out, __m256 value, bool add) {
  _mm256_storeu_ps(out, add ? _mm256_add_ps(_mm256_loadu_ps(out), value) : value);
}

// The activations of a tile's tokens at one step of STEP inputs.
template <int STEP>
struct Step {
  const int8_t* q;
  const float* scale;
  const int32_t* nsum;
  size_t cols;

  Step(const QuantRows& x, int t, int k) : cols(x.cols) {
    q = x.q + t * cols + k;
    scale = x.scale + t * (cols / 32) + k / 32;
    nsum = (STEP == 16 ? x.nsum16 : x.nsum) + t * (cols / STEP) + k / STEP;
  }
  const int8_t* inputs(int m, int i) const { return q + m * cols + i; }
  float scale_of(int m) const { return scale[m * (cols / 32)]; }
  int nsum_of(int m) const { return nsum[m * (cols / STEP)]; }
};

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
  for (int m = 0; m < M; m++) dot[m] = start_of<BITS, SYMMETRIC>(x.nsum_of(m));
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
        pairs[m] = place == 0 ? products : _mm256_add_epi16(pairs[m], products);
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

template <int BITS>
void unpack_panel(const Packed& w, int p, int k0, int depth, int step, Unpacked& out) {
  const int group = w.format.group, block_bytes = w.format.block_bytes();
  const uint8_t* block = w.panel(p) + static_cast<size_t>(k0 / group) * block_bytes;
  for (int k = 0; k < depth; k += group, block += block_bytes)
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

struct Piece {
  Unpacked* w;
  const QuantRows* x;
  int k0, depth;
  bool first, last, add;  // of the pieces of the depth: sums start at zero with the first and reach `out` with the last
  int t0;                 // first token of the block
  float* out;
  size_t ldo;
};

template <int BITS, int STEP, bool SYMMETRIC, int M>
void block_tile(const Piece& piece, int t) {
  for (int h = 0; h < 2; h++) {
    float *out = piece.out + t * piece.ldo + 8 * h, *partial = piece.w->partial + (t - piece.t0) * 16 + 8 * h;
    __m256 sum[M];
    for (int m = 0; m < M; m++) sum[m] = piece.first ? _mm256_setzero_ps() : _mm256_load_ps(partial + 16 * m);
    for (int g = 0; g < piece.depth / STEP; g++) {
      const Step<STEP> step(*piece.x, t, piece.k0 + g * STEP);
      const uint8_t* u = piece.w->u + g * STEP * 16 + 32 * h;
      __m256i dot[M];
      dot_step<BITS, STEP, SYMMETRIC>(step, dot, [&](int j, __m256i& first, __m256i& second) {
        first = load_bytes(u + 128 * j);
        second = load_bytes(u + 128 * j + 64);
      });
      const int at = g * 16 + 8 * h;
      const __m256 minimum = SYMMETRIC ? _mm256_setzero_ps() : _mm256_load_ps(piece.w->minimum + at);
      add_step<STEP, SYMMETRIC>(step, dot, _mm256_load_ps(piece.w->scale + at), minimum, sum);
    }
    for (int m = 0; m < M; m++) {
      if (piece.last)
        store(out + m * piece.ldo, sum[m], piece.add);
      else
        _mm256_store_ps(partial + 16 * m, sum[m]);
    }
  }
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
constexpr auto kernel_of() {
  if constexpr (HOW == How::kBlocked)
    return blocked<BITS, STEP, SYMMETRIC>;
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

const IntWay kIntWays[3] = {{"avx2 stream", 1, by_bits<How::kStream>},
                            {"avx2 stream, prefetch", 1, by_bits<How::kStreamAhead>},
                            {"avx2 unpack", 1, by_bits<How::kBlocked>}};

}  // namespace hasten::avx2
