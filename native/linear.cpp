#include "linear.h"

#include <algorithm>

#include "int_ways.h"
#include "threads.h"

namespace hasten {

void Activations::reserve(int tokens, int cols) {
  const int padded = round_up(cols, 128);
  const size_t n = static_cast<size_t>(tokens) * padded, floats = static_cast<size_t>(tokens) * row_stride(padded, 2);
  if (floats <= bf16_.size()) return;  // the last one to grow: what an allocation error cut short is made up for
  pool().quiesce();                    // late workers still read the buffers that move now
  q_.resize(n);
  scale_.resize(n / 32);
  nsum_.resize(n / 32);
  nsum16_.resize(n / 16);
  bf16_.resize(floats);
}

void Activations::shape(int cols, std::initializer_list<const Linear*> readers, bool prefill) {
  cols_ = cols;
  padded_ = round_up(cols, 128);
  stride_ = row_stride(padded_, 2);
  wide_ = prefill && kernels().linear_wide != nullptr;
  integers_ = wants_bf16_ = false;
  for (const Linear* reader : readers) (wide_ || reader->weight.format.bits == 16 ? wants_bf16_ : integers_) = true;
}

void Activations::set(int token, const float* row) {
  const Kernels& k = kernels();
  const size_t at = static_cast<size_t>(token) * padded_;
  if (integers_) k.quantize(row, cols_, padded_, &q_[at], &scale_[at / 32], &nsum_[at / 32], &nsum16_[at / 16]);
  if (wants_bf16_) k.to_bf16(row, cols_, padded_, &bf16_[static_cast<size_t>(token) * stride_]);
}

void Activations::set_group(int token, int group, const float* values, int count) {
  const Kernels& k = kernels();
  const size_t at = static_cast<size_t>(token) * padded_ + 32 * group;
  if (integers_) k.quantize(values, count, 32, &q_[at], &scale_[at / 32], &nsum_[at / 32], &nsum16_[at / 16]);
  if (wants_bf16_) k.to_bf16(values, count, 32, &bf16_[static_cast<size_t>(token) * stride_ + 32 * group]);
}

void Activations::clear_tail(int token) {
  static constexpr float kNothing[32] = {};
  for (int group = (cols_ + 31) / 32; group < padded_ / 32; group++) set_group(token, group, kNothing, 32);
}

namespace {

// The activations of a call in all their forms, by value: what a late worker goes on reading.
struct Inputs {
  QuantRows integers;
  const bf16* floats;
  int stride;
  bool wide;
  explicit Inputs(const Activations& x)
      : integers(x.integers()), floats(x.floats()), stride(x.stride()), wide(x.wide()) {}
};

// Panels p0 <= p < p1 of a layer into `out`, whose first column is that of panel p0. Integers go `way`, or if it is
// null the way chosen for their format.
void run_panels(const Packed& w, int p0, int p1, const Inputs& x, int tokens, float* out, size_t ldo, bool add,
                const IntWay* way = nullptr) {
  const Kernels& k = kernels();
  const Packed part{w.format, (p1 - p0) * kPanelRows, w.cols, w.panel(p0)};
  if (w.format.bits == 16)
    k.linear_bf16(part, 0, p1 - p0, x.floats, x.stride, tokens, out, ldo, add);
  else if (x.wide)
    k.linear_wide(part, 0, p1 - p0, x.floats, x.stride, tokens, out, ldo, add);
  else
    (way != nullptr ? *way : way_for(w.format, tokens)).run(part, 0, p1 - p0, x.integers, tokens, out, ldo, add);
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
  const Inputs inputs(x);
  pool().split(threads, (panels + 1) / 2, 1, [&](int begin, int end, int) {
    static thread_local HugeVector<float> products;
    products.resize(std::max<size_t>(products.size(), static_cast<size_t>(tokens) * 64));
    for (int strip = begin; strip < end; strip++) {
      const int p0 = 2 * strip, p1 = std::min(p0 + 2, panels), count = std::min(32, rows - 32 * strip);
      float *g = products.data(), *u = g + static_cast<size_t>(tokens) * 32;
      run_panels(gate.weight, p0, p1, inputs, tokens, g, 32, false);
      run_panels(up.weight, p0, p1, inputs, tokens, u, 32, false);
      add_biases(gate, 32 * strip, count, tokens, g);
      add_biases(up, 32 * strip, count, tokens, u);
      kernels().gated(kind, g, u, 32 * tokens);
      for (int t = 0; t < tokens; t++) into.set_group(t, strip, g + 32 * t, count);
    }
  });
  for (int t = 0; t < tokens; t++) into.clear_tail(t);
}

namespace {

// Up to here a step is a decode step, which a late worker must not hold up, and its results are few enough to be
// copied.
constexpr int kRetakenTokens = 24;
constexpr int kMostCalls = 3;                      // q, k, v
constexpr size_t kAheadBytes = size_t{256} << 10;  // that a waiting worker fetches: a part of its L2 cache

// A piece is `panels` panels of all calls in a row, at most; it is computed beside its place and copied there.
struct Product {
  struct Call {
    Packed weight;
    float* out;
    size_t ldo;
    bool add;
  };
  Inputs inputs;
  int tokens, panels;
  const IntWay* way;
  int count = 0;
  Call calls[kMostCalls] = {};
  Packed next[kMostCalls] = {};  // what the next product reads

  // Calls part(call, first panel, panels, where its results begin in the piece's scratch) for what a piece holds.
  template <typename Fn>
  void parts(int piece, const Fn& part) const {
    const int begin = piece * panels, end = begin + panels;
    int first = 0;
    size_t at = 0;
    for (int i = 0; i < count; i++) {
      const int p0 = std::max(begin - first, 0), p1 = std::min(end - first, calls[i].weight.panels());
      first += calls[i].weight.panels();
      if (p0 >= p1) continue;
      part(calls[i], p0, p1 - p0, at);
      at += static_cast<size_t>(tokens) * (p1 - p0) * kPanelRows;
    }
  }
  void compute(int piece, ThreadPool::Scratch& scratch) const {
    scratch.resize(std::max<size_t>(scratch.size(), static_cast<size_t>(tokens) * panels * kPanelRows));
    parts(piece, [&](const Call& call, int p0, int n, size_t at) {
      const size_t width = static_cast<size_t>(n) * kPanelRows;
      if (call.add)  // sums may begin with what is there: the bits are those of adding in place
        for (int t = 0; t < tokens; t++)
          std::copy_n(call.out + t * call.ldo + p0 * kPanelRows, width, scratch.data() + at + t * width);
      run_panels(call.weight, p0, p0 + n, inputs, tokens, scratch.data() + at, width, call.add, way);
    });
  }
  void commit(int piece, const ThreadPool::Scratch& scratch) const {
    parts(piece, [&](const Call& call, int p0, int n, size_t at) {
      const size_t width = static_cast<size_t>(n) * kPanelRows;
      for (int t = 0; t < tokens; t++)
        std::copy_n(scratch.data() + at + t * width, width, call.out + t * call.ldo + p0 * kPanelRows);
    });
  }
  // The beginning of the thread's share of the next product.
  ThreadPool::Range ahead(int thread, int threads) const {
    int all = 0;
    for (const Packed& w : next) all += w.panels();
    int panel = static_cast<int>(static_cast<int64_t>(all) * thread / threads);
    for (const Packed& w : next) {
      if (panel < w.panels()) {
        const size_t left = (w.panels() - panel) * w.format.panel_bytes(w.cols);
        return {w.panel(panel), std::min(left, kAheadBytes)};
      }
      panel -= w.panels();
    }
    return {};
  }
};

void linear_retaken(std::initializer_list<LinearCall> calls, const Inputs& x, int tokens, int threads, int grain,
                    const IntWay* way, int panels, std::initializer_list<const Linear*> next) {
  const int wanted = std::min(8 * threads, ThreadPool::kMostPieces);
  Product product{x, tokens, round_up((panels + wanted - 1) / wanted, grain), way};
  for (const LinearCall& call : calls)
    product.calls[product.count++] = {call.layer->weight, call.out, call.ldo, call.add};
  int i = 0;
  for (const Linear* layer : next) product.next[i++] = layer->weight;
  pool().retake(threads, (panels + product.panels - 1) / product.panels, product);
}

void linear_in_pieces(std::initializer_list<LinearCall> calls, const Activations& x, int tokens, int threads, int grain,
                      const IntWay* way, std::initializer_list<const Linear*> next = {}) {
  int panels = 0;
  for (const LinearCall& call : calls) panels += call.layer->weight.panels();
  const Inputs inputs(x);
  if (threads > 1 && tokens <= kRetakenTokens && panels > grain && calls.size() <= kMostCalls)
    return linear_retaken(calls, inputs, tokens, threads, grain, way, panels, next);
  const auto piece = [&](int begin, int end, int) {
    int first = 0;
    for (const LinearCall& call : calls) {
      const Packed& w = call.layer->weight;
      const int p0 = std::max(begin - first, 0), p1 = std::min(end - first, w.panels());
      first += w.panels();
      if (p0 >= p1) continue;
      run_panels(w, p0, p1, inputs, tokens, call.out + p0 * kPanelRows, call.ldo, call.add, way);
    }
  };
  // With many tokens the activations are larger than the weights: few, long pieces read them less often.
  pool().split(threads, panels, grain, piece, tokens > 64 ? 2 : 8);
}

}  // namespace

void linear(std::initializer_list<LinearCall> calls, const Activations& x, int tokens, int threads,
            std::initializer_list<const Linear*> next) {
  int grain = 1;
  for (const LinearCall& call : calls) grain = std::max(grain, side_by_side(call.layer->weight, x, tokens));
  linear_in_pieces(calls, x, tokens, threads, grain, nullptr, next);
}

void linear_by(const IntWay& way, std::initializer_list<LinearCall> calls, const Activations& x, int tokens,
               int threads) {
  linear_in_pieces(calls, x, tokens, threads, way.panels, &way);
}

}  // namespace hasten
