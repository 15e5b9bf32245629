// Which tokens a sequence has had, and how often in its answer: what penalties ask. 8 bytes a slot and at most 4 slots
// a distinct token, where an array over the vocabulary would take 600 kB a sequence for 151,936 tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace hasten {

class TokenCounts {
 public:
  struct Slot {
    int32_t token = -1;  // -1: empty
    int32_t answer = 0;  // times in the answer; 0: in the prompt alone
  };

  // Counts `times` more in the answer; 0 notes that the prompt has it.
  void add(int32_t token, int32_t times);
  // Times in the answer.
  int32_t answer(int32_t token) const;
  // Whether prompt or answer has it.
  bool has(int32_t token) const;
  // In no particular order, empty ones among them.
  const std::vector<Slot>& slots() const { return slots_; }

 private:
  size_t find(int32_t token) const;  // its slot, or the empty one where it goes
  void grow();

  size_t used_ = 0;
  std::vector<Slot> slots_;  // open addressing, a power of two, at most half full
};

}  // namespace hasten
