// Ways of computing integer layers, for what measures and chooses them.
#include "int_ways.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "bind.h"
#include "calls.h"

namespace hasten {
namespace {

PackedFormat checked(int bits, int group, bool symmetric) {
  const bool good =
      (bits == 4 || bits == 5 || bits == 6 || bits == 8) && (group == 16 || group == 32 || group == 64 || group == 128);
  if (!good) throw std::invalid_argument("no such integer format");
  return {bits, group, symmetric};
}

std::vector<std::string> names() {
  std::vector<std::string> found;
  for (const IntWay* way : int_ways()) found.emplace_back(way->name);
  return found;
}

std::vector<double> timed(int bits, int group, bool symmetric, int rows, int cols, int tokens, int threads,
                          int rounds) {
  if (rows < 1 || cols < 1 || tokens < 1 || threads < 1 || rounds < 1)
    throw std::invalid_argument("rows, columns, tokens, threads and rounds are positive");
  return time_ways(checked(bits, group, symmetric), rows, cols, tokens, threads, rounds);
}

}  // namespace

void bind_int_ways(nb::module_& m) {
  m.def("int_ways", &names, "Ways of computing integer layers that the instruction set in use may take.");
  m.def(
      "row_classes", [] { return std::vector<int>(kClassRows, kClassRows + kRowClasses); },
      "The largest number of tokens of each class that has a way of its own.");
  m.def(
      "way_for",
      [](int bits, int group, bool symmetric, int tokens) {
        return std::string(way_for(checked(bits, group, symmetric), tokens).name);
      },
      nb::arg("bits"), nb::arg("group"), nb::arg("symmetric"), nb::arg("tokens"), "The way in use.");
  m.def(
      "choose_way",
      [](int bits, int group, bool symmetric, int row_class, const std::string& name) {
        choose_way(checked(bits, group, symmetric), row_class, name);
      },
      nb::arg("bits"), nb::arg("group"), nb::arg("symmetric"), nb::arg("row_class"), nb::arg("name"),
      "Take a way for a format and a class of token numbers.");
  m.def("forget_ways", &forget_choices, "Go back to what is taken where nothing was measured.");
  m.def("time_ways", &timed, nb::arg("bits"), nb::arg("group"), nb::arg("symmetric"), nb::arg("rows"), nb::arg("cols"),
        nb::arg("tokens"), nb::arg("threads"), nb::arg("rounds"), nb::call_guard<WithoutGil>(),
        "Seconds that each way takes for one product with a matrix [rows, cols]; inf for one that dropped out, or that "
        "does what another does for so many tokens.");
}

}  // namespace hasten
