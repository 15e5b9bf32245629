#include "token_score.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace hasten {

namespace {

// log of the sum of e^(logit - largest): logits are infinite only if the largest is, and count 1 each then.
double log_total(RowBlocks* row) {
  if (!std::isinf(row->largest())) return std::log(row->weigh(1.0f));
  int certain = 0;
  for (int i = 0; i < row->size(); ++i) certain += (*row)[i] == row->largest();
  return std::log(static_cast<double>(certain));
}

}  // namespace

TokenScore score_of(RowBlocks* row, int token, int top) {
  const double largest = row->largest(), total = log_total(row);
  auto logprob = [&](double logit) { return logit == largest ? -total : logit - largest - total; };
  TokenScore score{logprob((*row)[token]), row->rank_of(token), {}};
  if (top <= 0) return score;
  std::vector<Candidate> likeliest;
  row->collect_top(std::min(top, row->size()), &likeliest);
  std::sort(likeliest.begin(), likeliest.end(), likelier);
  for (const Candidate& c : likeliest) score.top.emplace_back(c.id, logprob(c.logit));
  return score;
}

}  // namespace hasten
