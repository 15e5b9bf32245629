// AMX: tiles for linear layers and attention; everything else as on AVX512.
#include "isa/amx.h"

#include <algorithm>

#include "isa/avx2.h"

namespace hasten::amx {
namespace {

// Rows that are computed together: two tiles of them read every tile of keys and values, so that loading takes half as
// long as multiplying. Their scores and weights, 53 KB, have the place of those of the rows before.
constexpr int kRows = 2 * kTileRows;

// One part of the context for rows row .. row + kRows (PAIR) or one tile of them.
template <bool PAIR>
struct Block {
  const AttendPart& a;
  int row;

  // scores[.. kRows][page] = q . k, a column of tiles a 16 tokens of the page.
  void score(int page) const {
    const int d = a.head_dim;
    const bf16* q = a.q + static_cast<size_t>(row) * d;
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (PAIR) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int i = 0; i < d; i += 32) {
      _tile_loadd(6, a.k[page] + i * 16, 64);
      _tile_loadd(7, a.k[page] + 16 * d + i * 16, 64);
      _tile_loadd(4, q + i, 2 * d);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (PAIR) {
        _tile_loadd(5, q + kTileRows * d + i, 2 * d);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    store(a.scores + page * kPageTokens, kScoreRow);
  }

  // out[row ..][dim .. dim + 32] = weights . v over the part's pages: a page is one product deep.
  void value(int dim) const {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (PAIR) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int page = 0; page < a.pages; page++) {
      const bf16* weights = a.weights + page * kPageTokens;
      _tile_loadd(6, a.v[page] + dim * kPageTokens, 64);
      _tile_loadd(7, a.v[page] + (dim + 16) * kPageTokens, 64);
      _tile_loadd(4, weights, 2 * kWeightRow);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (PAIR) {
        _tile_loadd(5, weights + kTileRows * kWeightRow, 2 * kWeightRow);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    store(a.out + static_cast<size_t>(row) * a.head_dim + dim, a.head_dim);
  }

  // The sums: 32 columns of float rows that are `stride` floats apart.
  static void store(float* to, int stride) {
    _tile_stored(0, to, 4 * stride);
    _tile_stored(1, to + 16, 4 * stride);
    if constexpr (PAIR) {
      float* second = to + static_cast<size_t>(kTileRows) * stride;
      _tile_stored(2, second, 4 * stride);
      _tile_stored(3, second + 16, 4 * stride);
    }
  }

  void attend(int rows) const {
    for (int page = 0; page < a.pages; page++) score(page);
    avx512::softmax_rows(a, row, rows, a.scores, a.weights);
    Tiles::written();
    for (int dim = 0; dim < a.head_dim; dim += 32) value(dim);
  }
};

}  // namespace

void attend(const AttendPart& a) {
  Tiles tiles(64, 16);
  Tiles::written();
  int row = 0;
  if (a.rows >= kRows) tiles.tokens(kTileRows);
  for (; row + kRows <= a.rows; row += kRows) Block<true>{a, row}.attend(kRows);
  for (; row < a.rows; row += kTileRows) {
    const int rows = std::min(kTileRows, a.rows - row);
    tiles.tokens(rows);
    Block<false>{a, row}.attend(rows);
  }
}

}  // namespace hasten::amx

namespace hasten {

const Kernels kAmxKernels = {
    .name = "amx",
    .ways = avx512::kIntWays,
    .usual_way = {3, 2, 2, 5, 5, 4},
    .linear_bf16 = amx::linear_bf16,
    .linear_wide = amx::linear_wide,
    .quantize = avx512::quantize,
    .to_bf16 = avx512::to_bf16,
    .int8_to_bf16 = avx2::int8_to_bf16,
    .rms_norm = avx512::rms_norm,
    .gated = avx512::gated,
    .rope = avx512::rope,
    .attend_rows = 112,  // 7 tiles, which 16 tokens of 7 heads fill, and 28 of 4
    .attend = amx::attend,
    .argmax = avx512::argmax,
};

}  // namespace hasten
