// Sampling as the engine for many users asks for it: every sequence of a step in one call.
#include "sequence_sampler.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <deque>

#include "arrays.h"
#include "calls.h"
#include "threads.h"

namespace hasten {

namespace {

using Tokens = std::vector<int32_t>;
using Logits = Input<float, 2>;
using Mask = Input<uint32_t, 2>;

// Counts tokens while the interpreter lock is given away: one step at a time may use it, and that once.
struct PySampler : SequenceSampler {
  using SequenceSampler::SequenceSampler;
  std::atomic_flag busy;
};

struct Mine : Turn {
  explicit Mine(PySampler& of)
      : Turn(of.busy, "a sampler is used twice at the same time", "give each sequence a sampler of its own") {}
};

void require_tokens(const Tokens& tokens, int vocab) {
  for (const int32_t token : tokens)
    require(token >= 0 && token < vocab, "token " + std::to_string(token) + " is not in the vocabulary");
}

int vocab_of(const Logits& logits) {
  require(logits.shape(1) > 0 && logits.shape(1) < size_t{1} << 31, "logits must have columns");
  return static_cast<int>(logits.shape(1));
}

void init_sampler(PySampler* self, int vocab, double temperature, int top_k, double top_p, double min_p, uint64_t seed,
                  double repetition, double presence, double frequency, const Input<int32_t, 1>& biased,
                  const Input<float, 1>& biases) {
  require(vocab > 0, "the vocabulary is empty");
  require(biased.size() == biases.size(), "one bias a token");
  SequenceSampler::Bias bias(biased.size());
  for (size_t i = 0; i < bias.size(); ++i) bias[i] = {biased.data()[i], biases.data()[i]};
  require(std::all_of(bias.begin(), bias.end(), [=](const auto& b) { return b.first >= 0 && b.first < vocab; }),
          "a bias for a token that is not in the vocabulary");
  const Penalties penalties{static_cast<float>(std::clamp(repetition, 1e-30, 1e30)), static_cast<float>(presence),
                            static_cast<float>(frequency)};
  new (self) PySampler(vocab, {temperature, top_k, top_p, min_p, seed}, penalties, std::move(bias));
}

void py_add_prompt(PySampler& self, const Tokens& tokens) {
  const Mine mine(self);
  require_tokens(tokens, self.vocab());
  self.add_prompt(tokens.data(), static_cast<int>(tokens.size()));
}

void py_accept(PySampler& self, const Tokens& tokens) {
  const Mine mine(self);
  require_tokens(tokens, self.vocab());
  self.accept(tokens.data(), static_cast<int>(tokens.size()));
}

nb::tuple as_tuple(const TokenScore& score, int token) {
  nb::list top;
  for (const auto& [id, logprob] : score.top) top.append(nb::make_tuple(id, logprob));
  return nb::make_tuple(token, score.logprob, score.rank, nb::tuple(top));
}

nb::tuple as_tuple(const SequenceChoice& choice) {
  nb::list tokens, scores;
  for (const int32_t token : choice.tokens) tokens.append(token);
  for (size_t j = 0; j < choice.scores.size(); ++j) scores.append(as_tuple(choice.scores[j], choice.tokens[j]));
  const char* error = choice.error == RowError::kNone ? "" : choice.error == RowError::kNotANumber ? "nan" : "none";
  return nb::make_tuple(tokens, scores, error);
}

// The step's sequences, with what keeps their arrays alive.
struct Step {
  std::vector<SequenceRows> rows;
  std::vector<SequenceSampler*> samplers;
  std::deque<Mine> mine;
  std::vector<Mask> masks;

  void add(const Logits& logits, size_t first, PySampler* sampler, const Tokens& drafts, int64_t position,
           nb::handle mask, nb::handle top) {
    mine.emplace_back(*sampler);
    const int vocab = vocab_of(logits);
    require(sampler->vocab() == vocab, "a sampler was made for another vocabulary");
    require_tokens(drafts, vocab);
    SequenceRows s{
        sampler, logits.data() + first * vocab,          1 + static_cast<int>(drafts.size()), &drafts, position,
        nullptr, top.is_none() ? -1 : nb::cast<int>(top)};
    if (!mask.is_none()) {
      masks.push_back(nb::cast<Mask>(mask));
      const Mask& bits = masks.back();
      require(bits.shape(0) > 0, "a mask has no rows");
      require(bits.shape(1) == (static_cast<size_t>(vocab) + 31) / 32, "a mask is not ceil(V / 32) words wide");
      s.mask = bits.data();
      s.rows = static_cast<int>(std::min<size_t>(s.rows, bits.shape(0)));
    }
    rows.push_back(s);
    samplers.push_back(sampler);
  }
};

nb::list py_choose(const Logits& logits, const nb::list& samplers, const std::vector<Tokens>& drafts,
                   const std::vector<int64_t>& positions, const nb::list& masks, const nb::list& tops, int threads) {
  const size_t n = samplers.size();
  require(drafts.size() == n && positions.size() == n && masks.size() == n && tops.size() == n,
          "one entry a sequence of everything");
  Step step;
  size_t first = 0;
  for (size_t i = 0; i < n; ++i) {
    require(first + 1 + drafts[i].size() <= logits.shape(0), "logits have fewer rows than sequences and drafts");
    step.add(logits, first, nb::cast<PySampler*>(samplers[i]), drafts[i], positions[i], masks[i], tops[i]);
    first += 1 + drafts[i].size();
  }
  require(first == logits.shape(0), "logits have more rows than sequences and drafts");
  std::vector<SequenceChoice> choices;
  {
    const WithoutGil others_run;
    choices = choose(step.rows, threads);
    for (size_t i = 0; i < n; ++i)
      step.samplers[i]->accept(choices[i].tokens.data(), static_cast<int>(choices[i].tokens.size()));
  }
  nb::list out;
  for (const SequenceChoice& choice : choices) out.append(as_tuple(choice));
  return out;
}

std::vector<int> py_choose_of_few(const Logits& logits, const Input<int32_t, 2>& ids, const Input<double, 1>& totals,
                                  const nb::list& samplers, const std::vector<int64_t>& positions, int threads) {
  const size_t n = samplers.size(), few = logits.shape(1);
  require(few > 0 && logits.shape(0) == n && ids.shape(0) == n && ids.shape(1) == few && totals.size() == n &&
              positions.size() == n,
          "one row a sequence of everything");
  std::deque<Mine> mine;
  std::vector<PySampler*> each;
  for (size_t i = 0; i < n; ++i) {
    each.push_back(nb::cast<PySampler*>(samplers[i]));
    mine.emplace_back(*each.back());
    for (size_t j = 0; j < few; ++j) {
      const int32_t id = ids.data()[i * few + j], before = j ? ids.data()[i * few + j - 1] : -1;
      require(id > before && id < each[i]->vocab(), "ids must rise and be in the vocabulary");
    }
  }
  std::vector<int> tokens(n);
  const WithoutGil others_run;
  pool().split(threads, static_cast<int>(n), 1, [&](int begin, int end, int) {
    for (int i = begin; i < end; ++i) {
      const size_t at = i * few;
      tokens[i] = choose_of_few(
          *each[i], {logits.data() + at, ids.data() + at, static_cast<int>(few), totals.data()[i]}, positions[i]);
    }
  });
  for (size_t i = 0; i < n; ++i)
    if (tokens[i] != kNoToken) each[i]->accept(&tokens[i], 1);
  return tokens;
}

nb::list py_score(const Logits& logits, const Tokens& targets, int top, int threads) {
  const int vocab = vocab_of(logits);
  require(targets.size() == logits.shape(0), "targets must have one entry a row");
  require_tokens(targets, vocab);
  std::vector<TokenScore> scores;
  {
    const WithoutGil others_run;
    scores = score_rows(logits.data(), static_cast<int>(targets.size()), vocab, targets.data(), top, threads);
  }
  nb::list out;
  for (size_t r = 0; r < scores.size(); ++r) out.append(as_tuple(scores[r], targets[r]));
  return out;
}

}  // namespace

void bind_sequence_sampler(nb::module_& m) {
  nb::class_<PySampler>(m, "SequenceSampler", "One answer's sampling options, and the tokens that penalties count.")
      .def("__init__", &init_sampler, nb::arg("vocab"), nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"),
           nb::arg("min_p"), nb::arg("seed"), nb::arg("repetition"), nb::arg("presence"), nb::arg("frequency"),
           nb::arg("biased"), nb::arg("biases"))
      .def("add_prompt", &py_add_prompt, nb::arg("tokens"))
      .def("accept", &py_accept, nb::arg("tokens"));
  m.def(
      "choose", &py_choose, nb::arg("logits"), nb::arg("samplers"), nb::arg("drafts"), nb::arg("positions"),
      nb::arg("masks"), nb::arg("tops"), nb::arg("threads") = 1,
      "Next tokens of several sequences. Sequence i has 1 + len(drafts[i]) rows of logits float32 [R, V], masks[i] is "
      "None or uint32 [rows, ceil(V / 32)], tops[i] is None or how many alternatives to score. Gives (tokens, scores, "
      "error) each; a score is (token, logprob, rank, ((token, logprob), ...)), an error '', 'nan' or 'none' "
      "(allowed).");
  m.def("choose_of_few", &py_choose_of_few, nb::arg("logits"), nb::arg("ids"), nb::arg("totals"), nb::arg("samplers"),
        nb::arg("positions"), nb::arg("threads") = 1,
        "As choose, one row a sequence, from the highest logits float32 [R, N] of tokens int32 [R, N], by rising id, "
        "and the sums of all weights e^((logit - largest) / temperature) float64 [R]. -1: they do not tell.");
  m.def("score", &py_score, nb::arg("logits"), nb::arg("targets"), nb::arg("top"), nb::arg("threads") = 1,
        "(token, logprob, rank, ((token, logprob), ...)) of one target a row of logits float32 [R, V].");
}

}  // namespace hasten
