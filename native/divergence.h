// How far one row of logits is from another.
#pragma once

#include <cstdint>

namespace hasten {

struct RowDivergence {
  double kl = 0.0;        // KL(ref || cand), nats; not negative
  double nll_ref = 0.0;   // -log p_ref(target), nats
  double nll_cand = 0.0;  // -log p_cand(target), nats
  bool agree = false;     // same largest logit (the lowest id of equals)
};

// Logits [vocab]; target is the token that came next. Every figure is NaN where a logit is NaN or none is finite.
RowDivergence divergence_of(const float* ref, const float* cand, int vocab, int32_t target);

}  // namespace hasten
