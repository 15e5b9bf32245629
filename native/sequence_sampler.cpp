#include "sequence_sampler.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "isa/kernels.h"
#include "lanes.h"
#include "threads.h"

// This file is compiled with -ffp-contract=off: a seed gives the same tokens on every instruction set.

namespace hasten {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What the mask allows, minus infinity elsewhere; false if there is a NaN anywhere.
HASTEN_CLONES bool copy_allowed(const float* logits, const uint32_t* mask, int n, float* out) {
  const i32x8 bits = {1, 2, 4, 8, 16, 32, 64, 128};
  const f32x8 never = all8(-kInfinity);
  i32x8 bad = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const f32x8 v = load8(logits + i);
    const i32x8 allowed = bits & static_cast<int32_t>(mask[i / 32] >> (i % 32) & 0xff);
    bad |= v != v;
    store8(out + i, allowed != 0 ? v : never);
  }
  int any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= bad[lane];
  for (; i < n; ++i) {
    any |= logits[i] != logits[i];
    out[i] = mask[i / 32] >> (i % 32) & 1 ? logits[i] : -kInfinity;
  }
  return any == 0;
}

struct RowChoice {
  int token = kNoToken;
  RowError error = RowError::kNone;
  TokenScore score;
};

const float* logits_of(const SequenceRows& sequence, int row) {
  return sequence.logits + static_cast<size_t>(row) * sequence.sampler->vocab();
}

// Whether the token is that of the highest logit, and nothing else is asked for.
bool is_plain(const SequenceRows& sequence) {
  const SequenceSampler& sampler = *sequence.sampler;
  return !sampler.adjusts() && !sequence.mask && sequence.top < 0 && sampler.options().greedy();
}

// The tokens of the highest logits of plain rows: -1 where one is no number. A thread looks through the part of the
// vocabulary whose logits it computed, while its cache holds them, and then through what others left.
std::vector<int> best_tokens(const std::vector<const float*>& rows, int vocab, int threads) {
  constexpr int kLeast = 4096;  // logits of a part
  const int parts = std::clamp(vocab / kLeast, 1, std::max(threads, 1));
  const auto begin = [&](int part) { return static_cast<int>(int64_t{vocab} * part / parts); };
  std::vector<int> found(rows.size() * parts);
  std::vector<std::atomic<size_t>> next(parts);
  pool().run(parts, [&](int thread) {
    for (int i = 0; i < parts; ++i) {
      const int part = (thread + i) % parts, at = begin(part), count = begin(part + 1) - at;
      for (size_t row = next[part].fetch_add(1); row < rows.size(); row = next[part].fetch_add(1)) {
        const int best = kernels().argmax(rows[row] + at, count);
        found[row * parts + part] = best < 0 ? -1 : at + best;
      }
    }
  });
  std::vector<int> tokens(rows.size());
  for (size_t row = 0; row < rows.size(); ++row) {
    const int* mine = &found[row * parts];
    tokens[row] = mine[0];
    for (int part = 1; part < parts && tokens[row] >= 0; ++part)
      if (mine[part] < 0 || rows[row][mine[part]] > rows[row][tokens[row]]) tokens[row] = mine[part];
  }
  return tokens;
}

RowChoice chosen(int token) { return {token, token == kNoToken ? RowError::kNothingAllowed : RowError::kNone, {}}; }

// One row at a time, with scratch between them.
class RowChooser {
 public:
  RowChoice operator()(const SequenceRows& sequence, int j) {
    const SequenceSampler& sampler = *sequence.sampler;
    const int vocab = sampler.vocab();
    const float* logits = logits_of(sequence, j);
    const bool adjusts = sampler.adjusts() || sequence.mask, scores = sequence.top >= 0;
    if ((scores || !adjusts) && !raw_.survey(logits, vocab)) return {kNoToken, RowError::kNotANumber, {}};
    if (adjusts && !adjust(sequence, j, logits)) return {kNoToken, RowError::kNotANumber, {}};
    RowChoice choice = chosen(sampler_.draw(adjusts ? &adjusted_ : &raw_, sampler.options(), sequence.position + j));
    if (scores && choice.token != kNoToken) choice.score = score_of(&raw_, choice.token, sequence.top);
    return choice;
  }

 private:
  bool adjust(const SequenceRows& sequence, int j, const float* logits) {
    const SequenceSampler& sampler = *sequence.sampler;
    const int vocab = sampler.vocab();
    const size_t words = (static_cast<size_t>(vocab) + 31) / 32;
    copy_.resize(vocab);
    if (sequence.mask) {
      if (!copy_allowed(logits, sequence.mask + j * words, vocab, copy_.data())) return false;
    } else {
      std::copy(logits, logits + vocab, copy_.begin());
    }
    sampler.adjust(copy_.data(), sequence.drafts->data(), j);
    return adjusted_.survey(copy_.data(), vocab);
  }

  Sampler sampler_;
  RowBlocks raw_, adjusted_;
  std::vector<float> copy_;
};

// As RowChooser, of rows that are cut short.
class FewChooser {
 public:
  int operator()(const SequenceSampler& sampler, const FewLogits& row, int64_t position) {
    const SamplerOptions& options = sampler.options();
    const float unknown = *std::min_element(row.logits, row.logits + row.n);  // no other logit is higher
    copy_.assign(row.logits, row.logits + row.n);
    if (sampler.adjusts() && !sampler.adjust_few(copy_.data(), row.ids, row.n)) return kNoToken;
    const int k = options.greedy() ? 1 : options.top_k;
    if (k == 0 && sampler.adjusts()) return kNoToken;
    if (std::count_if(copy_.begin(), copy_.end(), [=](float x) { return x > unknown; }) < k) return kNoToken;
    if (!few_.survey(copy_.data(), row.n)) return kNoToken;
    const int place = sampler_.draw_of_few(&few_, options, position, row.total);
    return place == kNoToken ? kNoToken : row.ids[place];
  }

 private:
  Sampler sampler_;
  RowBlocks few_;
  std::vector<float> copy_;
};

// Threads of the pool stay: so does their scratch.
RowChooser& row_chooser() {
  static thread_local RowChooser chooser;
  return chooser;
}

struct Place {
  int sequence, row;
};

// Of the sequences that are plain, or of the others: row 0 of all, then row 1 of those that have one, and so on. What
// comes late is least likely to count.
std::vector<Place> places_of(const std::vector<SequenceRows>& sequences, bool plain) {
  std::vector<Place> places;
  int most = 0;
  for (const SequenceRows& s : sequences) most = std::max(most, s.rows);
  for (int row = 0; row < most; ++row)
    for (size_t i = 0; i < sequences.size(); ++i)
      if (row < sequences[i].rows && is_plain(sequences[i]) == plain) places.push_back({static_cast<int>(i), row});
  return places;
}

void choose_plain(const std::vector<SequenceRows>& sequences, int threads, std::vector<std::vector<RowChoice>>& rows) {
  const std::vector<Place> places = places_of(sequences, true);
  if (places.empty()) return;
  std::vector<const float*> logits;
  for (const auto [i, row] : places) logits.push_back(logits_of(sequences[i], row));
  const std::vector<int> tokens = best_tokens(logits, sequences[places[0].sequence].sampler->vocab(), threads);
  for (size_t p = 0; p < places.size(); ++p) {
    RowChoice& choice = rows[places[p].sequence][places[p].row];
    if (tokens[p] < 0)
      choice.error = RowError::kNotANumber;
    else
      choice = chosen(logits[p][tokens[p]] == -kInfinity ? kNoToken : tokens[p]);
  }
}

bool goes_on(const SequenceRows& sequence, int row, const RowChoice& choice) {
  const auto& drafts = *sequence.drafts;
  return choice.error == RowError::kNone && row < static_cast<int>(drafts.size()) && drafts[row] == choice.token;
}

SequenceChoice gather(const SequenceRows& sequence, std::vector<RowChoice>& rows) {
  SequenceChoice out;
  for (int j = 0; j < sequence.rows; ++j) {
    out.error = rows[j].error;
    if (out.error != RowError::kNone) break;
    out.tokens.push_back(rows[j].token);
    if (sequence.top >= 0) out.scores.push_back(std::move(rows[j].score));
    if (!goes_on(sequence, j, rows[j])) break;
  }
  return out;
}

}  // namespace

// However hard the penalty, it neither rules a token out nor makes it certain.
float Penalties::of(float logit, int32_t answer) const {
  constexpr float kMost = std::numeric_limits<float>::max();
  if (std::isinf(logit)) return logit;
  float out = logit > 0.0f ? logit / repetition : logit * repetition;
  out -= frequency * static_cast<float>(answer);
  if (answer > 0) out -= presence;
  return std::isnan(out) ? out : std::clamp(out, -kMost, kMost);
}

SequenceSampler::SequenceSampler(int vocab, const SamplerOptions& options, const Penalties& penalties, Bias bias)
    : vocab_(vocab), options_(options), penalties_(penalties), bias_(std::move(bias)) {}

void SequenceSampler::add_prompt(const int32_t* tokens, int n) {
  if (penalties_.repetition == 1.0f) return;  // no other penalty asks for the prompt
  for (int i = 0; i < n; ++i) counts_.add(tokens[i], 0);
}

void SequenceSampler::accept(const int32_t* tokens, int n) {
  if (!penalties_.any()) return;
  for (int i = 0; i < n; ++i) counts_.add(tokens[i], 1);
}

void SequenceSampler::adjust(float* logits, const int32_t* drafts, int drafted) const {
  for (const auto& [token, bias] : bias_) logits[token] += bias;
  if (!penalties_.any()) return;
  struct Drafted {
    int32_t token, times;
    float logit;
  };
  std::vector<int32_t> sorted(drafts, drafts + drafted);
  std::sort(sorted.begin(), sorted.end());
  std::vector<Drafted> more;
  for (const int32_t token : sorted) {
    if (more.empty() || more.back().token != token) more.push_back({token, 0, logits[token]});
    ++more.back().times;
  }
  for (const auto& slot : counts_.slots())
    if (slot.token >= 0) logits[slot.token] = penalties_.of(logits[slot.token], slot.answer);
  for (const Drafted& d : more) logits[d.token] = penalties_.of(d.logit, counts_.answer(d.token) + d.times);
}

bool SequenceSampler::adjust_few(float* logits, const int32_t* ids, int n) const {
  if (!penalties_.never_raise()) return false;
  for (const auto& [token, bias] : bias_) {
    const int32_t* at = std::lower_bound(ids, ids + n, token);
    if (at < ids + n && *at == token)
      logits[at - ids] += bias;
    else if (bias > 0.0f)
      return false;
  }
  if (penalties_.any())
    for (int i = 0; i < n; ++i)
      if (counts_.has(ids[i])) logits[i] = penalties_.of(logits[i], counts_.answer(ids[i]));
  return true;
}

int choose_of_few(const SequenceSampler& sampler, const FewLogits& row, int64_t position) {
  static thread_local FewChooser chooser;
  return chooser(sampler, row, position);
}

std::vector<SequenceChoice> choose(const std::vector<SequenceRows>& sequences, int threads) {
  const std::vector<Place> places = places_of(sequences, false);
  std::vector<std::vector<RowChoice>> rows(sequences.size());
  std::vector<std::atomic<int>> last(sequences.size());  // the last row that can count, as far as is known
  for (size_t i = 0; i < sequences.size(); ++i) {
    rows[i].resize(sequences[i].rows);
    last[i] = sequences[i].rows - 1;
  }
  choose_plain(sequences, threads, rows);
  std::atomic<size_t> next{0};
  if (!places.empty())
    pool().run(std::min(threads, static_cast<int>(places.size())), [&](int) {
      RowChooser& choose_row = row_chooser();
      for (size_t p = next.fetch_add(1); p < places.size(); p = next.fetch_add(1)) {
        const auto [i, row] = places[p];
        if (row > last[i].load(std::memory_order_relaxed)) continue;
        rows[i][row] = choose_row(sequences[i], row);
        if (goes_on(sequences[i], row, rows[i][row])) continue;
        for (int known = last[i]; row < known && !last[i].compare_exchange_weak(known, row);) {
        }
      }
    });
  std::vector<SequenceChoice> out;
  for (size_t i = 0; i < sequences.size(); ++i) out.push_back(gather(sequences[i], rows[i]));
  return out;
}

std::vector<TokenScore> score_rows(const float* logits, int rows, int vocab, const int32_t* targets, int top,
                                   int threads) {
  std::vector<TokenScore> out(rows);
  pool().split(threads, rows, 1, [&](int begin, int end, int) {
    static thread_local RowBlocks row;
    for (int r = begin; r < end; ++r) {
      const bool good = row.survey(logits + static_cast<size_t>(r) * vocab, vocab);
      if (good && row.best() != kNoToken)
        out[r] = score_of(&row, targets[r], top);
      else
        out[r].logprob = std::numeric_limits<double>::quiet_NaN();
    }
  });
  return out;
}

}  // namespace hasten
