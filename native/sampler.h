// The next token from a row of logits.
#pragma once

#include <cstdint>
#include <vector>

#include "row_blocks.h"

namespace hasten {

// Applied in the order of transformers' generate(): temperature, top-k, top-p, min-p. (llama.cpp's default chain makes
// the same cuts but applies the temperature after them.)
struct SamplerOptions {
  double temperature = 0.0;  // 0: the largest logit, the lowest id of equals
  int top_k = 0;             // 0: all
  double top_p = 1.0;        // the smallest set of likeliest tokens that reaches this probability
  double min_p = 0.0;        // at least this fraction of the likeliest token's probability
  uint64_t seed = 0;

  bool greedy() const { return static_cast<float>(temperature) <= 0.0f || top_k == 1; }
};

// Uniform in [0, 1) from (seed, position) alone, so that a draw does not depend on what else runs. Philox4x32-10.
// Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
double uniform_at(uint64_t seed, uint64_t position);

// Holds scratch between calls; one for each thread.
class Sampler {
 public:
  // kNoToken if a logit is NaN or none is above minus infinity. O(V); what may be kept is looked at again. Of equal
  // logits at a cut the lower ids stay.
  int operator()(const float* logits, int vocab, const SamplerOptions& options, int64_t position);
  // The same from a row that has been surveyed, and has no NaN.
  int draw(RowBlocks* row, const SamplerOptions& options, int64_t position);
  // The same where the row holds only the highest logits of a longer one, whose weights add up to `total`: a place in
  // it. kNoToken also if tokens that it does not hold might be drawn.
  int draw_of_few(RowBlocks* row, const SamplerOptions& options, int64_t position, double total);

 private:
  double weigh_top_k(float temperature);
  void collect_likely(const RowBlocks& row, const SamplerOptions& options, double total);
  void cut_top_p(double mass);
  int cut_and_draw(const SamplerOptions& options, double total, int64_t position);
  int draw_kept(double uniform) const;

  RowBlocks row_, few_;
  std::vector<float> logits_;    // of kept_, for few_
  std::vector<Candidate> kept_;  // in order of id
  std::vector<Candidate> ranked_;
};

}  // namespace hasten
