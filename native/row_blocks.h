// A row of logits seen as blocks of 64: the largest of each block says which blocks a search can pass by, and the sum
// of each block's weights says where a draw falls. Nothing as long as the row is written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace hasten {

constexpr int kNoToken = -1;  // a logit is NaN, or none is above minus infinity

struct Candidate {
  float logit;
  int32_t id;
  float weight;  // e^((logit - largest) / temperature)
};

// The order of tokens everywhere: larger logits first, of equals the lower id.
inline bool likelier(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

// Points into the row it surveyed last, which must stay. Holds scratch between rows; one for each thread.
class RowBlocks {
 public:
  static constexpr int kBlock = 64;

  // Reads the row once. False if a value is NaN; nothing else may be asked then.
  bool survey(const float* row, int n);

  int size() const { return n_; }
  float largest() const { return largest_; }
  float operator[](int id) const { return row_[id]; }
  // The lowest id of the largest; kNoToken if nothing is above minus infinity.
  int best() const;
  // 1 for the likeliest token.
  int rank_of(int id) const;

  // The sum of e^((logit - largest) / temperature), good to 3e-7 of itself; the largest must be finite. A weight w is
  // good to (1 - ln w) * 1e-7 of itself; below e^-87 it is 0.
  double weigh(float temperature);
  // The first token whose running sum of weights passes `target`, in order of id. After weigh().
  int draw(double target) const;

  // In order of id: every token whose weight is at least `least`. After weigh(), whose temperature counts.
  void collect_weights_from(float least, std::vector<Candidate>* out) const;
  // In order of id: the k likeliest tokens above minus infinity; their weights are not set.
  void collect_top(int k, std::vector<Candidate>* out);

 private:
  int blocks() const { return static_cast<int>(block_largest_.size()); }
  const float* block(int b) const { return (b + 1) * kBlock <= n_ ? row_ + static_cast<size_t>(b) * kBlock : tail_; }

  const float* row_ = nullptr;
  int n_ = 0;
  float largest_ = 0.0f;
  float factor_ = 0.0f;  // log2(e) / the temperature weighed with; 0 = not weighed yet
  double total_ = 0.0;
  float tail_[kBlock];  // the last block where it is not whole, filled up with minus infinity
  std::vector<float> block_largest_;
  std::vector<double> block_sum_;
  std::vector<float> ranked_;
  std::vector<Candidate> cut_;
};

}  // namespace hasten
