#include "row_blocks.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "lanes.h"
#include "numeric.h"

// This file is compiled with -ffp-contract=off: a seed gives the same tokens on every instruction set.

namespace hasten {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = kLowestPower;  // binary logarithm; lighter weights are 0
constexpr int kBlock = RowBlocks::kBlock;

using f64x4 = double __attribute__((vector_size(32)));
using f64x8 = double __attribute__((vector_size(64)));

HASTEN_INLINE float largest_of(f32x8 v) {
  v = max8(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
  v = max8(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
  v = max8(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
  return v[0];
}

// The largest of each of `blocks` whole blocks; false if there is a NaN.
HASTEN_CLONES bool survey_blocks(const float* row, int blocks, float* largest) {
  i32x8 bad = {};
  for (int b = 0; b < blocks; ++b, row += kBlock) {
    f32x8 top = load8(row);
    bad |= top != top;
    for (int i = kLanes; i < kBlock; i += kLanes) {
      const f32x8 v = load8(row + i);
      bad |= v != v;
      top = max8(v, top);
    }
    largest[b] = largest_of(top);
  }
  int any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= bad[lane];
  return any == 0;
}

// 2^y for y <= 0: two thirds of exp8's time. See numeric.h.
HASTEN_INLINE f32x8 power8(f32x8 y) {
  constexpr float kMagic = 0x1.8p23f;
  const f32x8 low = all8(kLowest), x = y < low ? low : y;
  const f32x8 shifted = x + kMagic, f = x - (shifted - kMagic);
  f32x8 p = f * kPowerTerms[0] + kPowerTerms[1];
  for (int i = 2; i < 7; i++) p = p * f + kPowerTerms[i];
  return y < low ? all8(0.0f) : float_of(bits_of(p) + (bits_of(shifted) << 23));
}

HASTEN_INLINE f32x8 weights8(const float* x, float largest, float factor) {
  return power8((load8(x) - largest) * factor);
}

HASTEN_INLINE double total_of(f32x8 v) {
  const f64x8 wide = __builtin_convertvector(v, f64x8);
  f64x4 half[2];
  std::memcpy(half, &wide, sizeof wide);
  const f64x4 sum = half[0] + half[1];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Sums of weights of whole blocks: trees of three float additions, doubles from there on; in doubles throughout it
// would take 1.8 times as long. Blocks too far below the largest to weigh anything are not read.
HASTEN_CLONES void weigh_blocks(const float* row, int blocks, const float* block_largest, float largest, float factor,
                                double* sums) {
  static_assert(kBlock == 8 * kLanes);
  for (int b = 0; b < blocks; ++b, row += kBlock) {
    sums[b] = 0.0;
    if ((block_largest[b] - largest) * factor < kLowest) continue;
    f32x8 w[8];
    for (int i = 0; i < 8; ++i) w[i] = weights8(row + i * kLanes, largest, factor);
    sums[b] = total_of(((w[0] + w[1]) + (w[2] + w[3])) + ((w[4] + w[5]) + (w[6] + w[7])));
  }
}

HASTEN_CLONES void weigh_one_block(const float* x, float largest, float factor, float* weights) {
  for (int i = 0; i < kBlock; i += kLanes) store8(weights + i, weights8(x + i, largest, factor));
}

// log2(e) / temperature, within limits that keep 0 and minus infinity what they are when multiplied.
float factor_of(float temperature) {
  return static_cast<float>(1.4426950408889634 / std::clamp(static_cast<double>(temperature), 1e-37, 1e37));
}

}  // namespace

bool RowBlocks::survey(const float* row, int n) {
  row_ = row;
  n_ = n;
  factor_ = 0.0f;
  const int whole = n / kBlock, rest = n % kBlock;
  block_largest_.resize(whole + (rest > 0));
  bool good = survey_blocks(row, whole, block_largest_.data());
  if (rest > 0) {
    std::fill(std::copy(row + n - rest, row + n, tail_), tail_ + kBlock, -kInfinity);
    good = survey_blocks(tail_, 1, block_largest_.data() + whole) && good;
  }
  largest_ = good && n > 0 ? *std::max_element(block_largest_.begin(), block_largest_.end()) : -kInfinity;
  return good;
}

int RowBlocks::best() const {
  if (largest_ == -kInfinity) return kNoToken;
  const auto where = std::find(block_largest_.begin(), block_largest_.end(), largest_) - block_largest_.begin();
  const float* values = block(static_cast<int>(where));
  return static_cast<int>(where) * kBlock + static_cast<int>(std::find(values, values + kBlock, largest_) - values);
}

int RowBlocks::rank_of(int id) const {
  const float value = row_[id];
  int before = 0;
  for (int b = 0; b < blocks(); ++b) {
    if (block_largest_[b] < value) continue;
    const float* values = block(b);
    const int lower = std::clamp(id - b * kBlock, 0, kBlock);  // tokens of the block that come first among equals
    for (int i = 0; i < kBlock; ++i) before += values[i] > value;
    for (int i = 0; i < lower; ++i) before += values[i] == value;
  }
  return before + 1;
}

double RowBlocks::weigh(float temperature) {
  const float factor = factor_of(temperature);
  if (factor == factor_) return total_;
  factor_ = factor;
  block_sum_.resize(blocks());
  const int whole = n_ / kBlock;
  weigh_blocks(row_, whole, block_largest_.data(), largest_, factor, block_sum_.data());
  if (whole < blocks())
    weigh_blocks(tail_, 1, block_largest_.data() + whole, largest_, factor, block_sum_.data() + whole);
  total_ = 0.0;
  for (const double sum : block_sum_) total_ += sum;
  return total_;
}

int RowBlocks::draw(double target) const {
  double before = 0.0;
  int where = 0;
  for (int b = 0; b < blocks(); ++b) {
    if (block_sum_[b] == 0.0) continue;
    where = b;
    if (before + block_sum_[b] > target) break;
    before += block_sum_[b];
  }
  float weights[kBlock];
  weigh_one_block(block(where), largest_, factor_, weights);
  int last = kNoToken;
  for (int i = 0; i < kBlock; ++i) {
    if (weights[i] == 0.0f) continue;
    last = where * kBlock + i;
    if ((before += weights[i]) > target) break;
  }
  return last;
}

void RowBlocks::collect_weights_from(float least, std::vector<Candidate>* out) const {
  out->clear();
  float weights[kBlock];
  const float lowest = std::log2(std::max(least, std::numeric_limits<float>::min())) - 0.01f;  // room for rounding
  for (int b = 0; b < blocks(); ++b) {
    if ((block_largest_[b] - largest_) * factor_ < lowest) continue;
    const float* values = block(b);
    weigh_one_block(values, largest_, factor_, weights);
    for (int i = 0; i < kBlock; ++i)
      if (weights[i] >= least && weights[i] > 0.0f) out->push_back({values[i], b * kBlock + i, weights[i]});
  }
}

// The k-th largest of the blocks' largest is at most the k-th largest of all: what is below it need not be looked at.
void RowBlocks::collect_top(int k, std::vector<Candidate>* out) {
  out->clear();
  float floor = -kInfinity;
  if (k <= blocks()) {
    ranked_ = block_largest_;
    std::nth_element(ranked_.begin(), ranked_.begin() + k - 1, ranked_.end(), std::greater<>());
    floor = ranked_[k - 1];
  }
  for (int b = 0; b < blocks(); ++b) {
    if (block_largest_[b] < floor) continue;
    const float* values = block(b);
    for (int i = 0; i < kBlock; ++i)
      if (values[i] >= floor && values[i] > -kInfinity) out->push_back({values[i], b * kBlock + i, 0.0f});
  }
  if (out->size() <= static_cast<size_t>(k)) return;
  cut_ = *out;
  std::nth_element(cut_.begin(), cut_.begin() + k - 1, cut_.end(), likelier);
  const Candidate least = cut_[k - 1];
  std::erase_if(*out, [&](const Candidate& c) { return likelier(least, c); });
}

}  // namespace hasten
