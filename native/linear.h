// Linear layers over the thread pool.
#pragma once

#include <initializer_list>
#include <vector>

#include "isa/kernels.h"

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
  // Says which forms the next layers read and how wide they are.
  void shape(int cols, bool integers, bool bf16);
  // Quantises one token's row of `cols` floats.
  void set(int token, const float* row);

  QuantRows integers() const { return {q_.data(), scale_.data(), nsum_.data(), nsum16_.data(), padded_}; }
  const bf16* floats() const { return bf16_.data(); }
  int padded() const { return padded_; }

 private:
  int cols_ = 0, padded_ = 0;
  bool integers_ = false, wants_bf16_ = false;
  std::vector<int8_t> q_;
  std::vector<float> scale_;
  std::vector<int32_t> nsum_, nsum16_;
  std::vector<bf16> bf16_;
};

// One product of the batch below: out[t][row] (+)= weight . x[t]. `ldo` is at least the rows rounded up to a panel.
struct LinearCall {
  const Linear* layer;
  float* out;
  size_t ldo;
  bool add = false;
};

// Runs layers that read the same activations in one go, their panels shared out over the threads. Biases are the caller's.
void linear(std::initializer_list<LinearCall> calls, const Activations& x, int tokens, int threads);

}  // namespace hasten
