#include "divergence.h"

#include <nanobind/stl/tuple.h>

#include "arrays.h"
#include "threads.h"

namespace hasten {

namespace {

using Logits = Input<float, 2>;
using Result = std::tuple<Owned<double>, Owned<double>, Owned<double>, Owned<bool>>;

Result py_divergence(const Logits& ref, const Logits& cand, const Input<int32_t, 1>& targets, int threads) {
  const size_t rows = ref.shape(0), vocab = ref.shape(1);
  require(cand.shape(0) == rows && cand.shape(1) == vocab, "both logits must have the same shape");
  require(targets.size() == rows, "targets must have one entry a row");
  require(vocab > 0 && vocab < size_t{1} << 31, "logits must have columns");
  for (size_t r = 0; r < rows; ++r)
    require(targets.data()[r] >= 0 && static_cast<size_t>(targets.data()[r]) < vocab,
            "target " + std::to_string(targets.data()[r]) + " of row " + std::to_string(r) + " is no token");
  std::unique_ptr<double[]> kl(new double[rows]), nll_ref(new double[rows]), nll_cand(new double[rows]);
  std::unique_ptr<bool[]> agree(new bool[rows]);
  {
    nb::gil_scoped_release release;
    pool().split(threads, static_cast<int>(rows), 1, [&](int begin, int end, int) {
      for (int r = begin; r < end; ++r) {
        const RowDivergence row =
            divergence_of(ref.data() + r * vocab, cand.data() + r * vocab, static_cast<int>(vocab), targets.data()[r]);
        kl[r] = row.kl;
        nll_ref[r] = row.nll_ref;
        nll_cand[r] = row.nll_cand;
        agree[r] = row.agree;
      }
    });
  }
  return {owned(std::move(kl), {rows}), owned(std::move(nll_ref), {rows}), owned(std::move(nll_cand), {rows}),
          owned(std::move(agree), {rows})};
}

}  // namespace

void bind_divergence(nb::module_& m) {
  m.def("divergence", &py_divergence, nb::arg("ref"), nb::arg("cand"), nb::arg("targets"), nb::arg("threads") = 1,
        "KL(ref || cand), -log p_ref(target), -log p_cand(target) in nats (float64 [R]) and whether both have the same "
        "largest logit (bool [R]), from logits float32 [R, V] and targets int32 [R].");
}

}  // namespace hasten
