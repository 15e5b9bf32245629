// What the integer kernels of several instruction sets share. Local to the file that includes it, which compiles it for
// its own instruction set.
#include "isa/kernels.h"

namespace hasten {
namespace {

// The activations of a tile's tokens at one step of STEP inputs.
template <int STEP>
struct Step {
  const int8_t* q;
  const float* scale;
  const int32_t* nsum;
  size_t cols, scales, nsums;  // of one token

  Step(const QuantRows& x, int t, int k) : cols(x.cols), scales(cols / 32), nsums(cols / STEP) {
    q = x.q + t * cols + k;
    scale = x.scale + t * scales + k / 32;
    nsum = (STEP == 16 ? x.nsum16 : x.nsum) + t * nsums + k / STEP;
  }
  // For all steps whose first input is a multiple of 32.
  void to_next(int k) {
    q += STEP;
    nsum++;
    scale += STEP == 32 ? 1 : k / 16 % 2;
  }
  const int8_t* inputs(int m, int i) const { return q + m * cols + i; }
  float scale_of(int m) const { return scale[m * scales]; }
  int nsum_of(int m) const { return nsum[m * nsums]; }
};

// Where the integer sum of a step starts, from minus the sum of q: it makes up for the zero point 2^(bits-1) of
// symmetric weights, which signed 8-bit weights have already and asymmetric ones have not.
template <int BITS, bool SYMMETRIC>
constexpr int int_start(int nsum) {
  if (SYMMETRIC == (BITS == 8)) return 0;
  return SYMMETRIC ? nsum * (1 << (BITS - 1)) : -128 * nsum;
}

}  // namespace
}  // namespace hasten
