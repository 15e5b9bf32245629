// AMX: tiles for linear layers and attention; everything else as on AVX512.
#include "isa/amx.h"

#include <algorithm>

#include "isa/avx2.h"

namespace hasten::amx {
namespace {

// scores[row .. row + tokens][page] = q . k, one tile a 16 tokens of the page.
void score_tile(const AttendPart& a, int row, int page) {
  const int d = a.head_dim, tokens = a.pages * kPageTokens;
  const bf16* q = a.q + static_cast<size_t>(row) * d;
  _tile_zero(0);
  _tile_zero(1);
  for (int i = 0; i < d; i += 32) {
    _tile_loadd(4, q + i, 2 * d);
    _tile_loadd(6, a.k[page] + i * 16, 64);
    _tile_loadd(7, a.k[page] + 16 * d + i * 16, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  float* scores = a.scores + static_cast<size_t>(row) * tokens + page * kPageTokens;
  _tile_stored(0, scores, 4 * tokens);
  _tile_stored(1, scores + 16, 4 * tokens);
}

// out[row .. row + tokens][dim .. dim + 32] = weights . v over the part's pages: a page is one product deep.
void value_tile(const AttendPart& a, int row, int dim) {
  const int tokens = a.pages * kPageTokens;
  _tile_zero(0);
  _tile_zero(1);
  for (int page = 0; page < a.pages; page++) {
    _tile_loadd(4, a.weights + static_cast<size_t>(row) * tokens + page * kPageTokens, 2 * tokens);
    _tile_loadd(6, a.v[page] + dim * kPageTokens, 64);
    _tile_loadd(7, a.v[page] + (dim + 16) * kPageTokens, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  float* out = a.out + static_cast<size_t>(row) * a.head_dim + dim;
  _tile_stored(0, out, 4 * a.head_dim);
  _tile_stored(1, out + 16, 4 * a.head_dim);
}

}  // namespace

void attend(const AttendPart& a) {
  Tiles tiles(64, 16);
  Tiles::written();
  for (int row = 0; row < a.rows; row += kTileRows) {
    tiles.tokens(std::min(kTileRows, a.rows - row));
    for (int page = 0; page < a.pages; page++) score_tile(a, row, page);
  }
  avx512::softmax_part(a);
  Tiles::written();
  for (int row = 0; row < a.rows; row += kTileRows) {
    tiles.tokens(std::min(kTileRows, a.rows - row));
    for (int dim = 0; dim < a.head_dim; dim += 32) value_tile(a, row, dim);
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
    .attend_rows = kFewestRows,
    .attend = amx::attend,
    .argmax = avx512::argmax,
};

}  // namespace hasten
