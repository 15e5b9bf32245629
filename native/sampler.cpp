#include "sampler.h"

#include <algorithm>
#include <limits>

#include "isa/kernels.h"
#include "lanes.h"

// This file is compiled with -ffp-contract=off: a seed gives the same tokens on every instruction set.

namespace hasten {

namespace {

HASTEN_CLONES double weigh_row(const float* logits, int n, float largest, float temperature, float* weights) {
  double total = 0.0;
  for (int i = 0; i < n; i += kLanes) {
    f32x8 v = all8(-std::numeric_limits<float>::infinity());
    if (n - i >= kLanes)
      v = load8(logits + i);
    else
      for (int lane = 0; lane < n - i; ++lane) v[lane] = logits[i + lane];
    store8(weights + i, exp8((v - largest) / temperature));
  }
  for (int i = 0; i < n; ++i) total += weights[i];
  return total;
}

// The first token whose running sum of weights passes `target`.
int draw_from_all(const float* weights, int n, double target) {
  double sum = 0.0;
  int last = kNoToken;
  for (int i = 0; i < n; ++i) {
    if (weights[i] == 0.0f) continue;
    last = i;
    if ((sum += weights[i]) > target) break;
  }
  return last;
}

}  // namespace

double uniform_at(uint64_t seed, uint64_t position) {
  uint32_t c[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c[0], b = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(a)};
    std::copy(next, next + 4, c);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return static_cast<double>((uint64_t{c[1]} << 32 | c[0]) >> 11) * 0x1p-53;
}

bool Sampler::likelier(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

// The k largest logits. What does not beat the k-th of those seen so far is passed by with one comparison.
void Sampler::collect_top_k(const float* logits, int vocab, int k) {
  float floor = -std::numeric_limits<float>::infinity();
  const size_t room = 2 * static_cast<size_t>(k) + 256;
  for (int i = 0; i < vocab; ++i) {
    if (!(logits[i] > floor)) continue;
    kept_.push_back({logits[i], i, 0.0f});
    if (kept_.size() < room) continue;
    std::nth_element(kept_.begin(), kept_.begin() + k - 1, kept_.end(), likelier);
    kept_.resize(k);
    floor = kept_.back().logit;
  }
  if (kept_.size() <= static_cast<size_t>(k)) return;
  std::nth_element(kept_.begin(), kept_.begin() + k - 1, kept_.end(), likelier);
  kept_.resize(k);
}

double Sampler::weigh_kept(float largest, float temperature) {
  std::sort(kept_.begin(), kept_.end(), [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
  const size_t n = kept_.size();
  weights_.resize(round_up(static_cast<int>(n), kLanes));
  for (size_t i = 0; i < n; ++i) weights_[i] = kept_[i].logit;
  const double total = weigh_row(weights_.data(), static_cast<int>(n), largest, temperature, weights_.data());
  for (size_t i = 0; i < n; ++i) kept_[i].weight = weights_[i];
  return total;
}

void Sampler::collect_from(const float* logits, int vocab, float floor) {
  for (int i = 0; i < vocab; ++i)
    if (weights_[i] >= floor) kept_.push_back({logits[i], i, weights_[i]});
}

// Keeps the shortest run of likeliest candidates whose weights reach `mass`: quickselect by weight, O(candidates).
void Sampler::cut_top_p(double mass) {
  ranked_ = kept_;
  double before = 0.0;  // weight of what is likelier than ranked_[low]
  size_t low = 0, high = ranked_.size();
  while (high - low > 32) {
    const size_t middle = low + (high - low) / 2;
    std::nth_element(ranked_.begin() + low, ranked_.begin() + middle, ranked_.begin() + high, likelier);
    double left = 0.0;
    for (size_t i = low; i < middle; ++i) left += ranked_[i].weight;
    if (before + left >= mass) {
      high = middle;
    } else {
      before += left;
      low = middle;
    }
  }
  std::sort(ranked_.begin() + low, ranked_.begin() + high, likelier);
  size_t last = low;
  while (last + 1 < high && (before += ranked_[last].weight) < mass) ++last;
  const Candidate least = ranked_[last];
  std::erase_if(kept_, [&](const Candidate& c) { return likelier(least, c); });
}

void Sampler::cut_min_p(float min_p) {
  std::erase_if(kept_, [&](const Candidate& c) { return c.weight < min_p; });
}

// kept_ is in order of id, so that the draw does not depend on how the candidates were found.
int Sampler::draw(double uniform) const {
  double total = 0.0, sum = 0.0;
  for (const Candidate& c : kept_) total += c.weight;
  int last = kNoToken;
  for (const Candidate& c : kept_) {
    if (c.weight == 0.0f) continue;
    last = c.id;
    if ((sum += c.weight) > uniform * total) break;
  }
  return last;
}

int Sampler::operator()(const float* logits, int vocab, const SamplerOptions& options, int64_t position) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const int best = kernels().argmax(logits, vocab);
  if (best < 0 || logits[best] == -kInfinity) return kNoToken;
  const auto temperature = static_cast<float>(options.temperature);
  if (temperature <= 0.0f || options.top_k == 1 || logits[best] == kInfinity) return best;
  const double uniform = uniform_at(options.seed, static_cast<uint64_t>(position));
  kept_.clear();
  double total = 0.0;
  if (options.top_k > 0 && options.top_k < vocab) {
    collect_top_k(logits, vocab, options.top_k);
    total = weigh_kept(logits[best], temperature);
  } else {
    weights_.resize(round_up(vocab, kLanes));
    total = weigh_row(logits, vocab, logits[best], temperature, weights_.data());
    if (options.top_p >= 1.0 && options.min_p <= 0.0) return draw_from_all(weights_.data(), vocab, uniform * total);
    // All tokens lighter than this weigh less than 1 - top_p together: the cut passes them by whatever it keeps.
    const double floor = std::max((1.0 - options.top_p) * total / vocab, options.top_p < 1.0 ? 0.0 : options.min_p);
    collect_from(logits, vocab, static_cast<float>(0.999 * floor));
  }
  if (options.top_p < 1.0) cut_top_p(options.top_p * total);
  cut_min_p(static_cast<float>(options.min_p));
  return draw(uniform);
}

}  // namespace hasten
