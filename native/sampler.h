// The next token from a row of logits.
#pragma once

#include <cstdint>
#include <vector>

namespace hasten {

// Applied in the order of transformers' generate(): temperature, top-k, top-p, min-p. (llama.cpp's default chain makes
// the same cuts but applies the temperature after them.)
struct SamplerOptions {
  double temperature = 0.0;  // 0: the largest logit, the lowest id of equals
  int top_k = 0;             // 0: all
  double top_p = 1.0;        // the smallest set of likeliest tokens that reaches this probability
  double min_p = 0.0;        // at least this fraction of the likeliest token's probability
  uint64_t seed = 0;
};

// Uniform in [0, 1) from (seed, position) alone, so that a draw does not depend on what else runs. Philox4x32-10.
// Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
double uniform_at(uint64_t seed, uint64_t position);

constexpr int kNoToken = -1;  // a logit is NaN, or none is above minus infinity

// Holds scratch between calls; one for each thread.
class Sampler {
 public:
  // O(V); what may be kept is looked at again. Of equal logits at a cut the lower ids stay.
  int operator()(const float* logits, int vocab, const SamplerOptions& options, int64_t position);

 private:
  struct Candidate {
    float logit;
    int32_t id;
    float weight;  // e^((logit - largest) / temperature)
  };
  static bool likelier(const Candidate& a, const Candidate& b);

  void collect_top_k(const float* logits, int vocab, int k);
  double weigh_kept(float largest, float temperature);
  void collect_from(const float* logits, int vocab, float floor);
  void cut_top_p(double mass);
  void cut_min_p(float min_p);
  int draw(double uniform) const;

  std::vector<float> weights_;   // [V], padded to whole lanes
  std::vector<Candidate> kept_;  // in order of id once weighed
  std::vector<Candidate> ranked_;
};

}  // namespace hasten
