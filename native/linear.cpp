#include "linear.h"

#include <algorithm>

#include "threads.h"

namespace hasten {

void Activations::reserve(int tokens, int cols) {
  const size_t n = static_cast<size_t>(tokens) * round_up(cols, 128);
  if (n <= q_.size()) return;
  q_.resize(n);
  scale_.resize(n / 32);
  nsum_.resize(n / 32);
  nsum16_.resize(n / 16);
  bf16_.resize(n);
}

void Activations::shape(int cols, bool integers, bool bf16) {
  cols_ = cols;
  padded_ = round_up(cols, 128);
  integers_ = integers;
  wants_bf16_ = bf16;
}

void Activations::set(int token, const float* row) {
  const Kernels& k = kernels();
  const size_t at = static_cast<size_t>(token) * padded_;
  if (integers_) k.quantize(row, cols_, padded_, &q_[at], &scale_[at / 32], &nsum_[at / 32], &nsum16_[at / 16]);
  if (wants_bf16_) k.to_bf16(row, cols_, padded_, &bf16_[at]);
}

void linear(std::initializer_list<LinearCall> calls, const Activations& x, int tokens, int threads) {
  const Kernels& k = kernels();
  int panels = 0;
  for (const LinearCall& call : calls) panels += call.layer->weight.panels();
  // Four panels at once feed one token best; many tokens work on pairs.
  pool().split(threads, panels, tokens == 1 ? 4 : 2, [&](int begin, int end, int) {
    int first = 0;
    for (const LinearCall& call : calls) {
      const Packed& w = call.layer->weight;
      const int p0 = std::max(begin - first, 0), p1 = std::min(end - first, w.panels());
      first += w.panels();
      if (p0 >= p1) continue;
      if (w.format.bits == 16) k.linear_bf16(w, p0, p1, x.floats(), x.padded(), tokens, call.out, call.ldo, call.add);
      else k.linear_int(w, p0, p1, x.integers(), tokens, call.out, call.ldo, call.add);
    }
  });
}

}  // namespace hasten
