#include "sampler.h"

#include <algorithm>
#include <limits>

#include "isa/kernels.h"

// This file is compiled with -ffp-contract=off: a seed gives the same tokens on every instruction set.

namespace hasten {

namespace {

double mass_of(const std::vector<Candidate>& candidates) {
  double mass = 0.0;
  for (const Candidate& c : candidates) mass += c.weight;
  return mass;
}

float as_float(double temperature) {
  return static_cast<float>(std::min(temperature, static_cast<double>(std::numeric_limits<float>::max())));
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

// kept_: everything that top-p and min-p may keep. All tokens lighter than (1 - top_p) * total / V weigh less than
// 1 - top_p together, so that the cut passes them by whatever it keeps; mostly a few of the likeliest do, and are tried
// first.
void Sampler::collect_likely(const RowBlocks& row, const SamplerOptions& options, double total) {
  constexpr double kFirst = 1e-3, kNext = 1.0 / 32;
  const double least = std::max((1.0 - options.top_p) * total / row.size(), options.min_p);
  double floor = options.top_p < 1.0 ? std::max(std::min(kFirst * total, 1.0), least) : least;
  for (;;) {
    row.collect_weights_from(static_cast<float>(0.999 * floor), &kept_);
    if (floor <= least || mass_of(kept_) >= options.top_p * total) return;
    floor = std::max(kNext * floor, least);
  }
}

// Weighs kept_ as if there were nothing else; returns the sum.
double Sampler::weigh_top_k(float temperature) {
  logits_.resize(kept_.size());
  for (size_t i = 0; i < kept_.size(); ++i) logits_[i] = kept_[i].logit;
  few_.survey(logits_.data(), static_cast<int>(logits_.size()));
  const double total = few_.weigh(temperature);
  few_.collect_weights_from(0.0f, &ranked_);
  for (Candidate& c : ranked_) c.id = kept_[c.id].id;
  kept_.swap(ranked_);
  return total;
}

// kept_ is in order of id, so that the draw does not depend on how the candidates were found.
int Sampler::draw_kept(double uniform) const {
  const double target = uniform * mass_of(kept_);
  double sum = 0.0;
  int last = kNoToken;
  for (const Candidate& c : kept_) {
    if (c.weight == 0.0f) continue;
    last = c.id;
    if ((sum += c.weight) > target) break;
  }
  return last;
}

int Sampler::draw(RowBlocks* row, const SamplerOptions& options, int64_t position) {
  const int best = row->best();
  if (best == kNoToken || options.greedy() || row->largest() == std::numeric_limits<float>::infinity()) return best;
  const float temperature = as_float(options.temperature);
  double total = 0.0;
  if (options.top_k > 0 && options.top_k < row->size()) {
    row->collect_top(options.top_k, &kept_);
    total = weigh_top_k(temperature);
  } else {
    total = row->weigh(temperature);
    if (options.top_p >= 1.0 && options.min_p <= 0.0)
      return row->draw(uniform_at(options.seed, static_cast<uint64_t>(position)) * total);
    collect_likely(*row, options, total);
  }
  return cut_and_draw(options, total, position);
}

int Sampler::draw_of_few(RowBlocks* row, const SamplerOptions& options, int64_t position, double total) {
  if (options.greedy() || (options.top_k > 0 && options.top_k < row->size())) return draw(row, options, position);
  const float largest = row->largest();
  if (options.top_k > 0 || !(largest < std::numeric_limits<float>::infinity()) || row->best() == kNoToken)
    return kNoToken;
  row->weigh(as_float(options.temperature));
  row->collect_weights_from(0.0f, &kept_);
  const auto lightest =
      std::min_element(kept_.begin(), kept_.end(), [](auto& a, auto& b) { return a.weight < b.weight; });
  const bool holds_top_p = options.top_p < 1.0 && mass_of(kept_) >= options.top_p * total;
  const bool holds_min_p = lightest->weight < static_cast<float>(options.min_p);
  return holds_top_p || holds_min_p ? cut_and_draw(options, total, position) : kNoToken;
}

// Of kept_, which weighs something of `total`.
int Sampler::cut_and_draw(const SamplerOptions& options, double total, int64_t position) {
  if (options.top_p < 1.0) cut_top_p(options.top_p * total);
  std::erase_if(kept_, [&](const Candidate& c) { return c.weight < static_cast<float>(options.min_p); });
  return draw_kept(uniform_at(options.seed, static_cast<uint64_t>(position)));
}

int Sampler::operator()(const float* logits, int vocab, const SamplerOptions& options, int64_t position) {
  if (options.greedy()) {
    const int best = kernels().argmax(logits, vocab);
    return best < 0 || logits[best] == -std::numeric_limits<float>::infinity() ? kNoToken : best;
  }
  return row_.survey(logits, vocab) ? draw(&row_, options, position) : kNoToken;
}

}  // namespace hasten
