// Drafts for speculation: what followed the last time the text ended as it ends now.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace hasten {

// What followed a match so far, seen from one token.
enum class Evidence { kOnce = 0, kAlways = 1, kMostly = 2, kSeldom = 3 };  // kMostly: half of the times or more

// The smallest automaton that accepts every substring of a text, kept as the text grows; token ids as letters. A state
// stands for substrings that end at the same places. Source: Blumer et al., The smallest automaton recognizing the
// subwords of a text (1985); for drafts: Hu et al., SAM Decoding (2024), Oliaro et al., SuffixDecoding (2024).
//
// At most 2 states and 3 transitions a token. Most states have one transition, which stands in the state itself (28
// bytes); the others stand in one hash table (16 bytes, and 5 to 11 of index).
class SuffixAutomaton {
 public:
  // A suffix of some other text that occurs in this one: the longest such, if it was moved on token by token.
  struct Match {
    int32_t state = 0;
    int32_t length = 0;  // tokens
  };

  SuffixAutomaton();

  // Amortised O(1).
  void append(int32_t token);
  // The match of a text that is one token longer. Amortised O(1) over the tokens of that text, also if tokens are
  // appended here in between.
  Match advance(Match match, int32_t token) const;
  // The same match after tokens were appended here: states may have been split since, and the match then belongs to the
  // part for short substrings.
  Match settled(Match match) const;
  // The longest suffix of this text that occurs in it earlier.
  Match repeated() const;
  // Where in the text an occurrence of the match ends, exclusive: the latest one, without the one that ends the text.
  int32_t end_of(Match match) const { return states_[match.state].end + 1; }
  // What speaks for a token after a state's substrings, from what followed them so far; moves on to the state after it.
  Evidence evidence(int32_t& state, int32_t token) const;

  const std::vector<int32_t>& text() const { return text_; }
  size_t bytes() const;  // memory held, spare room included

 private:
  static constexpr int32_t kNone = -1;
  // With each token so many suffixes that occurred before have their place and count brought up to date, from the
  // longest down: the rest stay behind, which only texts of one repeated token come to.
  static constexpr int kFresh = 64;

  struct State {
    int32_t length;  // of its longest substring
    int32_t link;    // the state of its longest suffix that ends at more places
    int32_t end;     // where its latest occurrence ends, inclusive
    int32_t count;   // how often it occurs
    int32_t token;   // the first transition
    int32_t target = kNone;
    int32_t more = kNone;  // the others: a list in edges_
  };
  struct Edge {
    int32_t state, token, target;
    int32_t next;  // of the same state
  };

  int32_t target(int32_t state, int32_t token) const;
  void set(int32_t state, int32_t token, int32_t target);
  int32_t split(int32_t from, int32_t token, int32_t whole);
  size_t slot(int32_t state, int32_t token) const;
  void rehash(size_t slots);

  std::vector<int32_t> text_;
  std::vector<State> states_;
  std::vector<Edge> edges_;
  std::vector<int32_t> index_;  // open addressing: (state, token) -> edge; size a power of two
  int32_t last_ = 0;            // the state of the whole text
};

// Texts of finished requests, the older ones forgotten: two automata, of which the older is dropped when the newer is
// full. It holds `most` tokens or fewer, and half of them at least once it has been full.
class RecentTexts {
 public:
  explicit RecentTexts(size_t most) : most_(most) {}

  // What of the text's beginning stands in the newer automaton already is not stored again.
  void add(const std::vector<int32_t>& text);

  const SuffixAutomaton* newer() const { return newer_.get(); }
  const SuffixAutomaton* older() const { return older_.get(); }
  uint64_t generation() const { return generation_; }  // automata begun so far
  size_t tokens() const;
  size_t bytes() const;

 private:
  size_t most_;
  std::unique_ptr<SuffixAutomaton> newer_, older_;
  uint64_t generation_ = 0;
};

// Where one sequence stands in its own text and in the recent ones.
class DraftText {
 public:
  enum class Source { kNone = 0, kPrompt = 1, kRecent = 2, kAnswer = 3 };
  struct Proposal {
    Source source = Source::kNone;
    int32_t length = 0;             // tokens matched
    std::vector<int32_t> tokens;    // what followed them there
    std::vector<int32_t> evidence;  // of each token
  };

  // `recent` may be null.
  explicit DraftText(std::shared_ptr<const RecentTexts> recent) : recent_(std::move(recent)) {}

  // The first piece is the prompt. Amortised O(1) a token. Of a long piece only the end is looked up in the recent
  // texts: a match there is no longer than 128 tokens and what came after.
  void append(const std::vector<int32_t>& tokens);
  // What followed the longest match of at least `least` tokens; of equal ones the own text's. Copied where the text
  // that is copied ends while copying: a loop of three tokens is proposed as often as it fits.
  Proposal propose(size_t most, int32_t least);
  // Tokens matched in the own text, the newer and the older recent texts.
  std::array<int32_t, 3> lengths();
  const std::vector<int32_t>& text() const { return own_.text(); }
  size_t bytes() const { return own_.bytes(); }

 private:
  void meet();
  void follow(size_t count);

  SuffixAutomaton own_;
  std::shared_ptr<const RecentTexts> recent_;
  SuffixAutomaton::Match newer_, older_;
  uint64_t generation_ = 0;
  size_t prompt_ = 0;  // tokens
};

}  // namespace hasten
