// How likely the model itself holds a token: before mask, bias, penalties and temperature.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "row_blocks.h"

namespace hasten {

struct TokenScore {
  double logprob = 0.0;                         // natural log
  int rank = 0;                                 // 1 = the likeliest
  std::vector<std::pair<int32_t, double>> top;  // the likeliest tokens, best first
};

// Of a surveyed row without NaN and not all minus infinity. If logits are plus infinity, they share all probability.
TokenScore score_of(RowBlocks* row, int token, int top);

}  // namespace hasten
