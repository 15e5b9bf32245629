#include "sampler.h"

#include <vector>

#include "arrays.h"
#include "threads.h"

namespace hasten {

namespace {

Owned<int32_t> py_sample(const Input<float, 2>& logits, double temperature, int top_k, double top_p, double min_p,
                         uint64_t seed, const Input<int64_t, 1>& positions, int threads) {
  const int rows = static_cast<int>(logits.shape(0)), vocab = static_cast<int>(logits.shape(1));
  require(vocab > 0, "logits have no columns");
  require(positions.size() == logits.shape(0), "positions must have one entry a row");
  const SamplerOptions options{temperature, top_k, top_p, min_p, seed};
  std::unique_ptr<int32_t[]> tokens(new int32_t[rows]);
  {
    nb::gil_scoped_release release;
    pool().split(threads, rows, 1, [&](int begin, int end, int) {
      static thread_local Sampler sampler;  // its scratch is as long as a row
      for (int r = begin; r < end; ++r)
        tokens[r] = sampler(logits.data() + static_cast<size_t>(r) * vocab, vocab, options, positions.data()[r]);
    });
  }
  for (int r = 0; r < rows; ++r)
    require(tokens[r] != kNoToken, "row " + std::to_string(r) + " has a NaN logit or none above minus infinity");
  return owned(std::move(tokens), {static_cast<size_t>(rows)});
}

}  // namespace

void bind_sampler(nb::module_& m) {
  m.def("sample", &py_sample, nb::arg("logits"), nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"),
        nb::arg("min_p"), nb::arg("seed"), nb::arg("positions"), nb::arg("threads") = 1,
        "Next tokens int32 [R] of logits float32 [R, V]; positions int64 [R] and the seed fix each draw. Temperature 0 "
        "is greedy. Raises ValueError on a row with NaN.");
}

}  // namespace hasten
