// The next tokens of many sequences from the logits of one step: masks, bias and penalties, then sampler.h. Rows that
// verify drafts are sampled as if they came one at a time.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "sampler.h"
#include "token_counts.h"
#include "token_score.h"

namespace hasten {

struct Penalties {
  // Tokens of prompt and answer: positive logits divided by it, others multiplied. Source: Keskar et al., CTRL (2019),
  // as transformers has it.
  float repetition = 1.0f;
  // Tokens of the answer: logit - count * frequency - presence. Source: OpenAI's API reference.
  float presence = 0.0f;
  float frequency = 0.0f;

  bool any() const { return repetition != 1.0f || presence != 0.0f || frequency != 0.0f; }
  bool never_raise() const { return repetition >= 1.0f && presence >= 0.0f && frequency >= 0.0f; }
  float of(float logit, int32_t answer) const;
};

// One answer's options and what they must remember of it. Not for two threads at once.
class SequenceSampler {
 public:
  using Bias = std::vector<std::pair<int32_t, float>>;  // (token, added to its logit)

  SequenceSampler(int vocab, const SamplerOptions& options, const Penalties& penalties, Bias bias);

  int vocab() const { return vocab_; }
  const SamplerOptions& options() const { return options_; }
  bool adjusts() const { return penalties_.any() || !bias_.empty(); }
  bool counts() const { return penalties_.any(); }

  void add_prompt(const int32_t* tokens, int n);  // once
  void accept(const int32_t* tokens, int n);      // answer tokens, in the order they came

  // Bias and penalties of the row that follows the answer and `drafted` more tokens, in place.
  void adjust(float* logits, const int32_t* drafts, int drafted) const;
  // The same of some tokens of the row after the answer, by rising id. False if another one's logit might rise.
  bool adjust_few(float* logits, const int32_t* ids, int n) const;

 private:
  int vocab_;
  SamplerOptions options_;
  Penalties penalties_;
  Bias bias_;
  TokenCounts counts_;
};

// The rows of one sequence in a step's logits: one, and one more a draft.
struct SequenceRows {
  const SequenceSampler* sampler;
  const float* logits;                 // [rows][V]
  int rows;                            // at most 1 + drafts; less where a mask ends before
  const std::vector<int32_t>* drafts;  // drafts[j] is what row j must give for row j + 1 to count
  int64_t position;                    // of row 0, for the random numbers
  const uint32_t* mask;                // [rows][ceil(V / 32)], bit = allowed; null = all
  int top;                             // alternatives with each token's score; -1 = no scores
};

enum class RowError { kNone, kNotANumber, kNothingAllowed };

struct SequenceChoice {
  std::vector<int32_t> tokens;  // the drafts that were drawn, and one more
  std::vector<TokenScore> scores;
  RowError error = RowError::kNone;  // of the row after those tokens
};

// Does not count what it chose: accept() does. Rows are spread over `threads` of the pool in the order of their place
// in their sequence; rows after a draft that was not drawn are left out as soon as that is known.
std::vector<SequenceChoice> choose(const std::vector<SequenceRows>& sequences, int threads);

// The `n` highest logits of a row, by rising id, and what they were chosen from: the sum of all weights
// e^((logit - largest) / temperature), asked for where top-p is the only cut and there are no penalties and no bias.
struct FewLogits {
  const float* logits;
  const int32_t* ids;
  int n;
  double total;
};

// The token that `choose` draws from the whole row without a mask; kNoToken if that cannot be told from these. Totals
// that were summed in another way give another token where a draw falls on the edge between two. Does not count it.
int choose_of_few(const SequenceSampler& sampler, const FewLogits& row, int64_t position);

// Scores of tokens in their rows; a row with NaN or nothing above minus infinity gives the logprob NaN.
std::vector<TokenScore> score_rows(const float* logits, int rows, int vocab, const int32_t* targets, int top,
                                   int threads);

}  // namespace hasten
