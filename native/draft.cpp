#include "draft.h"

#include <algorithm>

namespace hasten {

namespace {

constexpr int32_t kSeparator = -1;   // stands between the recent texts; no token is negative
constexpr size_t kOverlap = 32;      // tokens of a known beginning that are stored again, to be matched from
constexpr size_t kRemembered = 128;  // tokens looked back on to find a sequence's place in an automaton it is new to

}  // namespace

SuffixAutomaton::SuffixAutomaton() { states_.push_back({0, kNone, kNone, 0, 0}); }

size_t SuffixAutomaton::slot(int32_t state, int32_t token) const {
  const uint64_t key = uint64_t{static_cast<uint32_t>(state)} << 32 | static_cast<uint32_t>(token);
  size_t at = static_cast<size_t>(key * 0x9E3779B97F4A7C15u >> 32) & (index_.size() - 1);
  while (index_[at] != kNone && (edges_[index_[at]].state != state || edges_[index_[at]].token != token))
    at = (at + 1) & (index_.size() - 1);
  return at;
}

void SuffixAutomaton::rehash(size_t slots) {
  index_.assign(slots, kNone);
  for (size_t e = 0; e < edges_.size(); ++e) index_[slot(edges_[e].state, edges_[e].token)] = static_cast<int32_t>(e);
}

int32_t SuffixAutomaton::target(int32_t state, int32_t token) const {
  const State& s = states_[state];
  if (s.target == kNone || s.token == token) return s.target;
  if (s.more == kNone) return kNone;
  const int32_t edge = index_[slot(state, token)];
  return edge == kNone ? kNone : edges_[edge].target;
}

void SuffixAutomaton::set(int32_t state, int32_t token, int32_t target) {
  State& s = states_[state];
  if (s.target == kNone || s.token == token) {
    s.token = token;
    s.target = target;
    return;
  }
  if (4 * (edges_.size() + 1) > 3 * index_.size()) rehash(std::max<size_t>(16, 2 * index_.size()));
  int32_t& edge = index_[slot(state, token)];
  if (edge != kNone) {
    edges_[edge].target = target;
    return;
  }
  edge = static_cast<int32_t>(edges_.size());
  edges_.push_back({state, token, target, s.more});
  s.more = edge;
}

// `whole` ends at more places than its longest substring does, once the new token stands: what of it is no longer than
// `from` and the token becomes a state of its own.
int32_t SuffixAutomaton::split(int32_t from, int32_t token, int32_t whole) {
  const int32_t copy = static_cast<int32_t>(states_.size());
  State state = states_[whole];
  state.length = states_[from].length + 1;
  state.more = kNone;
  states_.push_back(state);
  for (int32_t edge = states_[whole].more; edge != kNone; edge = edges_[edge].next)
    set(copy, edges_[edge].token, edges_[edge].target);
  for (; from != kNone && target(from, token) == whole; from = states_[from].link) set(from, token, copy);
  states_[whole].link = copy;
  return copy;
}

void SuffixAutomaton::append(int32_t token) {
  // Every suffix of the text until now has just occurred; only now, so that repeated() knows the time before.
  int32_t seen = states_[last_].link;
  for (int step = 0; seen > 0 && step < kFresh; ++step, seen = states_[seen].link) {
    states_[seen].end = states_[last_].end;
    ++states_[seen].count;
  }

  const int32_t fresh = static_cast<int32_t>(states_.size());
  states_.push_back({states_[last_].length + 1, 0, static_cast<int32_t>(text_.size()), 1, 0});
  text_.push_back(token);
  int32_t from = last_, next = kNone;
  for (; from != kNone && (next = target(from, token)) == kNone; from = states_[from].link) set(from, token, fresh);
  if (from != kNone)
    states_[fresh].link = states_[next].length == states_[from].length + 1 ? next : split(from, token, next);
  last_ = fresh;
}

SuffixAutomaton::Match SuffixAutomaton::repeated() const {
  const int32_t link = states_[last_].link;
  return link <= 0 ? Match{} : Match{link, states_[link].length};
}

SuffixAutomaton::Match SuffixAutomaton::settled(Match match) const {
  while (match.state > 0 && match.length <= states_[states_[match.state].link].length)
    match.state = states_[match.state].link;
  return match;
}

SuffixAutomaton::Match SuffixAutomaton::advance(Match match, int32_t token) const {
  match = settled(match);
  for (int32_t state = match.state; state != kNone; state = states_[state].link) {
    if (state != match.state) match = {state, states_[state].length};
    if (const int32_t next = target(state, token); next != kNone) return {next, match.length + 1};
  }
  return {};
}

Evidence SuffixAutomaton::evidence(int32_t& state, int32_t token) const {
  if (state == 0) return Evidence::kOnce;  // the copy has gone on past the text's end
  const int32_t times = states_[state].count;
  state = std::max(target(state, token), 0);
  if (state == 0 || times <= 1) return Evidence::kOnce;
  if (states_[state].count >= times) return Evidence::kAlways;
  return 2 * states_[state].count >= times ? Evidence::kMostly : Evidence::kSeldom;
}

size_t SuffixAutomaton::bytes() const {
  return sizeof(*this) + text_.capacity() * sizeof(int32_t) + states_.capacity() * sizeof(State) +
         edges_.capacity() * sizeof(Edge) + index_.capacity() * sizeof(int32_t);
}

void RecentTexts::add(const std::vector<int32_t>& text) {
  const size_t half = most_ / 2;
  if (half < 2 || text.empty()) return;
  size_t begin = text.size() - std::min(text.size(), half - 1);  // of a text that does not fit the end is kept
  if (newer_ && begin == 0) {
    SuffixAutomaton::Match match;
    size_t known = 0;
    while (known < text.size()) {
      const SuffixAutomaton::Match next = newer_->advance(match, text[known]);
      if (next.length != match.length + 1) break;
      match = next;
      ++known;
    }
    if (known == text.size()) return;
    if (known > kOverlap) begin = known - kOverlap;
  }
  if (!newer_ || newer_->text().size() + (text.size() - begin) + 1 > half) {
    begin = text.size() - std::min(text.size(), half - 1);  // the newer automaton knows no beginning
    older_ = std::move(newer_);
    newer_ = std::make_unique<SuffixAutomaton>();
    ++generation_;
  }
  for (size_t i = begin; i < text.size(); ++i) newer_->append(text[i]);
  newer_->append(kSeparator);
}

size_t RecentTexts::tokens() const {
  return (newer_ ? newer_->text().size() : 0) + (older_ ? older_->text().size() : 0);
}

size_t RecentTexts::bytes() const { return (newer_ ? newer_->bytes() : 0) + (older_ ? older_->bytes() : 0); }

// Moves on in the recent texts by the last `count` tokens of the own one.
void DraftText::follow(size_t count) {
  const std::vector<int32_t>& text = own_.text();
  if (!recent_ || !recent_->newer()) return;
  if (count > kRemembered) newer_ = older_ = {};
  for (size_t i = text.size() - std::min(count, kRemembered); i < text.size(); ++i) {
    newer_ = recent_->newer()->advance(newer_, text[i]);
    if (recent_->older()) older_ = recent_->older()->advance(older_, text[i]);
  }
}

// Finds the sequence's place in automata that were begun since it last looked.
void DraftText::meet() {
  if (!recent_ || generation_ == recent_->generation()) return;
  generation_ = recent_->generation();
  newer_ = older_ = {};
  follow(std::min(own_.text().size(), kRemembered));
}

void DraftText::append(const std::vector<int32_t>& tokens) {
  meet();
  for (const int32_t token : tokens) own_.append(token);
  if (prompt_ == 0) prompt_ = tokens.size();
  follow(tokens.size());
}

std::array<int32_t, 3> DraftText::lengths() {
  meet();
  return {own_.repeated().length, newer_.length, older_.length};
}

DraftText::Proposal DraftText::propose(size_t most, int32_t least) {
  meet();
  Proposal proposal;
  const SuffixAutomaton* where = nullptr;
  SuffixAutomaton::Match match;
  const auto consider = [&](const SuffixAutomaton* automaton, SuffixAutomaton::Match found, Source source) {
    if (!automaton || found.length < least || found.length <= match.length) return;
    where = automaton;
    match = automaton->settled(found);
    proposal.source = source;
  };
  consider(&own_, own_.repeated(), Source::kPrompt);
  if (recent_) {
    consider(recent_->newer(), newer_, Source::kRecent);
    consider(recent_->older(), older_, Source::kRecent);
  }
  if (!where) return proposal;
  proposal.length = match.length;
  const std::vector<int32_t>& text = where->text();
  const size_t begin = static_cast<size_t>(where->end_of(match));
  if (where == &own_ && begin >= prompt_) proposal.source = Source::kAnswer;
  int32_t state = match.state;
  for (size_t i = begin; proposal.tokens.size() < most; ++i) {
    // past the end of its own text the sequence goes on with what it was just proposed
    const int32_t token = i < text.size() ? text[i] : proposal.tokens[i - text.size()];
    if (token == kSeparator) break;
    proposal.tokens.push_back(token);
    proposal.evidence.push_back(static_cast<int32_t>(where->evidence(state, token)));
  }
  return proposal;
}

}  // namespace hasten
