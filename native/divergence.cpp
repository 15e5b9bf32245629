#include "divergence.h"

#include <cmath>
#include <limits>

#include "isa/kernels.h"
#include "lanes.h"

namespace hasten {

namespace {

struct Sums {
  double ref = 0.0, cand = 0.0;  // of e^(logit - largest)
  double cross = 0.0;            // of e^(ref - largest) * ((ref - largest) - (cand - largest))
};

HASTEN_INLINE double total(f32x8 v) {
  double sum = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) sum += v[lane];
  return sum;
}

struct Lanes {
  f32x8 ref = {}, cand = {}, cross = {};

  HASTEN_INLINE void add(f32x8 a, f32x8 b) {
    const f32x8 p = exp8(a);
    ref += p;
    cand += exp8(b);
    cross += p == 0.0f ? all8(0.0f) : p * (a - b);  // 0 log 0 is 0
  }
};

// Sums in floats over short stretches, in doubles over the row.
HASTEN_CLONES void sum_row(const float* ref, const float* cand, int n, float ref_max, float cand_max, Sums* sums) {
  constexpr int kStretch = 16 * kLanes;
  const float nothing = -std::numeric_limits<float>::infinity();
  for (int begin = 0; begin < n; begin += kStretch) {
    Lanes lanes;
    const int end = begin + kStretch < n ? begin + kStretch : n;
    int i = begin;
    for (; i + kLanes <= end; i += kLanes) lanes.add(load8(ref + i) - ref_max, load8(cand + i) - cand_max);
    if (i < end) {
      f32x8 a = all8(nothing), b = a;
      for (int lane = 0; lane < end - i; ++lane) {
        a[lane] = ref[i + lane] - ref_max;
        b[lane] = cand[i + lane] - cand_max;
      }
      lanes.add(a, b);
    }
    sums->ref += total(lanes.ref);
    sums->cand += total(lanes.cand);
    sums->cross += total(lanes.cross);
  }
}

}  // namespace

RowDivergence divergence_of(const float* ref, const float* cand, int vocab, int32_t target) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  const int best_ref = kernels().argmax(ref, vocab), best_cand = kernels().argmax(cand, vocab);
  if (best_ref < 0 || best_cand < 0 || !std::isfinite(ref[best_ref]) || !std::isfinite(cand[best_cand]))
    return {kNaN, kNaN, kNaN, false};
  Sums sums;
  sum_row(ref, cand, vocab, ref[best_ref], cand[best_cand], &sums);
  const double log_ref = std::log(sums.ref), log_cand = std::log(sums.cand);
  RowDivergence out;
  const double kl = sums.cross / sums.ref - log_ref + log_cand;
  out.kl = kl < 0.0 ? 0.0 : kl;  // rounding alone goes below
  out.nll_ref = log_ref - (static_cast<double>(ref[target]) - ref[best_ref]);
  out.nll_cand = log_cand - (static_cast<double>(cand[target]) - cand[best_cand]);
  out.agree = best_ref == best_cand;
  return out;
}

}  // namespace hasten
