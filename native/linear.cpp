#include "linear.h"

#include <algorithm>

#include "int_ways.h"
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

void Activations::shape(int cols, std::initializer_list<const Linear*> readers, bool prefill) {
  cols_ = cols;
  padded_ = round_up(cols, 128);
  wide_ = prefill && kernels().linear_wide != nullptr;
  integers_ = wants_bf16_ = false;
  for (const Linear* reader : readers) (wide_ || reader->weight.format.bits == 16 ? wants_bf16_ : integers_) = true;
}

void Activations::set(int token, const float* row) {
  const Kernels& k = kernels();
  const size_t at = static_cast<size_t>(token) * padded_;
  if (integers_) k.quantize(row, cols_, padded_, &q_[at], &scale_[at / 32], &nsum_[at / 32], &nsum16_[at / 16]);
  if (wants_bf16_) k.to_bf16(row, cols_, padded_, &bf16_[at]);
}

void Activations::set_group(int token, int group, const float* values, int count) {
  const Kernels& k = kernels();
  const size_t at = static_cast<size_t>(token) * padded_ + 32 * group;
  if (integers_) k.quantize(values, count, 32, &q_[at], &scale_[at / 32], &nsum_[at / 32], &nsum16_[at / 16]);
  if (wants_bf16_) k.to_bf16(values, count, 32, &bf16_[at]);
}

void Activations::clear_tail(int token) {
  static constexpr float kNothing[32] = {};
  for (int group = (cols_ + 31) / 32; group < padded_ / 32; group++) set_group(token, group, kNothing, 32);
}

namespace {

// Panels p0 <= p < p1 of a layer into `out`, whose first column is that of panel p0. Integers go `way`, or if it is
// null the way chosen for their format.
void run_panels(const Packed& w, int p0, int p1, const Activations& x, int tokens, float* out, size_t ldo, bool add,
                const IntWay* way = nullptr) {
  const Kernels& k = kernels();
  const Packed part{w.format, (p1 - p0) * kPanelRows, w.cols, w.panel(p0)};
  if (w.format.bits == 16)
    k.linear_bf16(part, 0, p1 - p0, x.floats(), x.padded(), tokens, out, ldo, add);
  else if (x.wide())
    k.linear_wide(part, 0, p1 - p0, x.floats(), x.padded(), tokens, out, ldo, add);
  else
    (way != nullptr ? *way : way_for(w.format, tokens)).run(part, 0, p1 - p0, x.integers(), tokens, out, ldo, add);
}

// Panels that a layer reads side by side.
int side_by_side(const Packed& w, const Activations& x, int tokens) {
  if (w.format.bits == 16 || x.wide()) return tokens == 1 ? 4 : 2;
  return way_for(w.format, tokens).panels;
}

// Biases of rows first to first + count - 1 onto a strip [tokens][32].
void add_biases(const Linear& layer, int first, int count, int tokens, float* strip) {
  if (layer.bias == nullptr) return;
  for (int t = 0; t < tokens; t++)
    for (int i = 0; i < count; i++) strip[32 * t + i] += layer.bias[first + i];
}

}  // namespace

void linear_gated(const Linear& gate, const Linear& up, Gate kind, const Activations& x, int tokens, int threads,
                  Activations& into) {
  const int rows = gate.weight.rows, panels = gate.weight.panels();
  pool().split(threads, (panels + 1) / 2, 1, [&](int begin, int end, int) {
    static thread_local HugeVector<float> products;
    products.resize(std::max<size_t>(products.size(), static_cast<size_t>(tokens) * 64));
    for (int strip = begin; strip < end; strip++) {
      const int p0 = 2 * strip, p1 = std::min(p0 + 2, panels), count = std::min(32, rows - 32 * strip);
      float *g = products.data(), *u = g + static_cast<size_t>(tokens) * 32;
      run_panels(gate.weight, p0, p1, x, tokens, g, 32, false);
      run_panels(up.weight, p0, p1, x, tokens, u, 32, false);
      add_biases(gate, 32 * strip, count, tokens, g);
      add_biases(up, 32 * strip, count, tokens, u);
      kernels().gated(kind, g, u, 32 * tokens);
      for (int t = 0; t < tokens; t++) into.set_group(t, strip, g + 32 * t, count);
    }
  });
  for (int t = 0; t < tokens; t++) into.clear_tail(t);
}

namespace {

void linear_in_pieces(std::initializer_list<LinearCall> calls, const Activations& x, int tokens, int threads, int grain,
                      const IntWay* way) {
  int panels = 0;
  for (const LinearCall& call : calls) panels += call.layer->weight.panels();
  const auto piece = [&](int begin, int end, int) {
    int first = 0;
    for (const LinearCall& call : calls) {
      const Packed& w = call.layer->weight;
      const int p0 = std::max(begin - first, 0), p1 = std::min(end - first, w.panels());
      first += w.panels();
      if (p0 >= p1) continue;
      run_panels(w, p0, p1, x, tokens, call.out + p0 * kPanelRows, call.ldo, call.add, way);
    }
  };
  // With many tokens the activations are larger than the weights: few, long pieces read them less often.
  pool().split(threads, panels, grain, piece, tokens > 64 ? 2 : 8);
}

}  // namespace

void linear(std::initializer_list<LinearCall> calls, const Activations& x, int tokens, int threads) {
  int grain = 1;
  for (const LinearCall& call : calls) grain = std::max(grain, side_by_side(call.layer->weight, x, tokens));
  linear_in_pieces(calls, x, tokens, threads, grain, nullptr);
}

void linear_by(const IntWay& way, std::initializer_list<LinearCall> calls, const Activations& x, int tokens,
               int threads) {
  linear_in_pieces(calls, x, tokens, threads, way.panels, &way);
}

}  // namespace hasten
