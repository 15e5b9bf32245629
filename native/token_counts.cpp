#include "token_counts.h"

#include <utility>

namespace hasten {

// Fibonacci hashing: neighbouring ids, as byte tokens are, go far apart.
size_t TokenCounts::find(int32_t token) const {
  const size_t mask = slots_.size() - 1;
  size_t at = static_cast<size_t>(static_cast<uint32_t>(token) * 0x9E3779B97F4A7C15ull >> 32) & mask;
  while (slots_[at].token != token && slots_[at].token != -1) at = (at + 1) & mask;
  return at;
}

void TokenCounts::grow() {
  std::vector<Slot> before(slots_.empty() ? 64 : 2 * slots_.size());
  before.swap(slots_);
  for (const Slot& slot : before)
    if (slot.token != -1) slots_[find(slot.token)] = slot;
}

void TokenCounts::add(int32_t token, int32_t times) {
  if (2 * used_ >= slots_.size()) grow();
  Slot& slot = slots_[find(token)];
  used_ += slot.token == -1;
  slot.token = token;
  slot.answer += times;
}

int32_t TokenCounts::answer(int32_t token) const { return slots_.empty() ? 0 : slots_[find(token)].answer; }

bool TokenCounts::has(int32_t token) const { return !slots_.empty() && slots_[find(token)].token == token; }

}  // namespace hasten
