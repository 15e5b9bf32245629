// Linear layers over the thread pool.
#pragma once

#include <initializer_list>
#include <vector>

#include "isa/kernels.h"
#include "memory.h"

namespace hasten {

// A matrix with whatever bias comes with it.
struct Linear {
  Packed weight;
  const float* bias = nullptr;  // [rows] or null

  bool present() const { return weight.data != nullptr; }
};

// The activations of `m` tokens in the forms the layers that read them need: int8 for integer weights, bf16 for bf16
// weights. One buffer is made for the widest input and used again and again.
class Activations {
 public:
  void reserve(int tokens, int cols);
  // Says how wide the next rows are and which layers read them. `prefill`: many tokens may take the wide kernels.
  void shape(int cols, std::initializer_list<const Linear*> readers, bool prefill);
  // Quantises one token's row of `cols` floats.
  void set(int token, const float* row);
  // Quantises `count` values of a row from column 32 * group on, at most 32. Columns past the last are the caller's to
  // clear.
  void set_group(int token, int group, const float* values, int count);
  // Zeros past the last whole group of a row that is filled by set_group.
  void clear_tail(int token);

  QuantRows integers() const { return {q_.data(), scale_.data(), nsum_.data(), nsum16_.data(), padded_}; }
  const bf16* floats() const { return bf16_.data(); }
  int stride() const { return stride_; }  // bf16 values from a row to the next
  bool wide() const { return wide_; }     // integer weights are to be read with the bf16 form

 private:
  int cols_ = 0, padded_ = 0, stride_ = 0;
  bool integers_ = false, wants_bf16_ = false, wide_ = false;
  HugeVector<int8_t> q_;
  HugeVector<float> scale_;
  HugeVector<int32_t> nsum_, nsum16_;
  HugeVector<bf16> bf16_;
};

// One product of the batch below: out[t][row] (+)= weight . x[t]. `ldo` is at least the rows rounded up to a panel.
struct LinearCall {
  const Linear* layer;
  float* out;
  size_t ldo;
  bool add = false;
};

// The gated half of an MLP for many tokens: into[t] = act(gate . x[t] + bias) * (up . x[t] + bias), quantised. Strips
// of 32 rows are finished one by one, so that the two wide products never travel to memory and back.
void linear_gated(const Linear& gate, const Linear& up, Gate kind, const Activations& x, int tokens, int threads,
                  Activations& into);

// Runs layers that read the same activations in one go, their panels shared out over the threads. Biases are the
// caller's. `next`: the layers, at most three, that the next call will read; threads that wait fetch their beginnings.
void linear(std::initializer_list<LinearCall> calls, const Activations& x, int tokens, int threads,
            std::initializer_list<const Linear*> next = {});

// The same for integer weights in one way, to time it.
void linear_by(const IntWay& way, std::initializer_list<LinearCall> calls, const Activations& x, int tokens,
               int threads);

}  // namespace hasten
