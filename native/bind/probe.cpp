#include "probe.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "bind.h"
#include "calls.h"

namespace hasten {
namespace {

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const ProbeKernels* k : probe_kernels()) names.emplace_back(k->name);
  return names;
}

const Peak& peak_of(const ProbeKernels& k, const std::string& kind) {
  if (kind == "int8") return k.int8;
  if (kind == "bf16") return k.bf16;
  if (kind == "fp32") return k.fp32;
  throw std::invalid_argument("kind must be int8, bf16 or fp32, not " + kind);
}

std::vector<std::tuple<std::string, std::string>> peaks() {
  std::vector<std::tuple<std::string, std::string>> found;
  for (const ProbeKernels* k : probe_kernels())
    for (const char* kind : {"int8", "bf16", "fp32"})
      if (peak_of(*k, kind).run) found.emplace_back(k->name, kind);
  return found;
}

std::vector<double> run_peak(const std::string& isa, const std::string& kind, int threads, double seconds) {
  for (const ProbeKernels* k : probe_kernels())
    if (isa == k->name && peak_of(*k, kind).run) return measure_peak(peak_of(*k, kind), threads, seconds);
  throw std::invalid_argument("this machine has no " + kind + " loop for " + isa);
}

std::tuple<size_t, std::vector<double>> run_read(int threads, size_t bytes, double seconds) {
  const ReadRates rates = measure_read(threads, bytes, seconds);
  return {rates.bytes, rates.gb_per_s};
}

}  // namespace

void bind_probe(nb::module_& m) {
  using Release = nb::call_guard<WithoutGil>;
  m.def("probe_isas", &isas, "Instruction sets that run here, best last.");
  m.def("probe_peaks", &peaks, "(isa, kind) of every ceiling that can be measured here.");
  m.def("probe_peak_tera_per_s", &run_peak, nb::arg("isa"), nb::arg("kind"), nb::arg("threads"), nb::arg("seconds"),
        Release(), "1e12 operations a second, one figure a round, all threads together.");
  m.def("probe_read_gb_per_s", &run_read, nb::arg("threads"), nb::arg("bytes"), nb::arg("seconds"), Release(),
        "(bytes read a round, 1e9 bytes a second of each round), all threads reading one buffer together.");
}

}  // namespace hasten
