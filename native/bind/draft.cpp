#include "draft.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "arrays.h"

namespace hasten {

namespace {

using Tokens = std::vector<int32_t>;

void need_tokens(const Tokens& tokens) {
  for (const int32_t token : tokens) require(token >= 0, "token ids are 0 or more");
}

std::tuple<int, int32_t, Tokens, Tokens> py_propose(DraftText& draft, size_t most, int32_t least) {
  DraftText::Proposal found = draft.propose(most, least);
  return {static_cast<int>(found.source), found.length, std::move(found.tokens), std::move(found.evidence)};
}

}  // namespace

void bind_draft(nb::module_& m) {
  nb::class_<RecentTexts>(m, "RecentTexts", "Texts of finished requests, at most so many tokens; the oldest go first.")
      .def(nb::init<size_t>(), nb::arg("most"))
      .def(
          "add", [](RecentTexts& texts, const DraftText& draft) { texts.add(draft.text()); }, nb::arg("draft"),
          "Keep a sequence's text. Microseconds for each 10 tokens.")
      .def_prop_ro("tokens", &RecentTexts::tokens, "Tokens held, separators included.")
      .def_prop_ro("bytes", &RecentTexts::bytes, "Memory held.");
  nb::class_<DraftText>(m, "DraftText", "One sequence's text, and where it stands in itself and in the recent ones.")
      .def(
          "__init__",
          [](DraftText* self, std::shared_ptr<RecentTexts> recent) { new (self) DraftText(std::move(recent)); },
          nb::arg("recent").none())
      .def(
          "append",
          [](DraftText& draft, const Tokens& tokens) {
            need_tokens(tokens);
            draft.append(tokens);
          },
          nb::arg("tokens"), "Token ids the text goes on with.")
      .def("propose", &py_propose, nb::arg("most"), nb::arg("least") = 1,
           "(source, tokens matched, what followed, evidence): source 0 no match of at least `least` tokens, 1 the "
           "prompt (what was appended first), 2 a recent text, 3 the answer; at most `most` token ids. Evidence of "
           "each token, from what came after "
           "the same tokens before: 0 they came once, 1 it always followed, 2 half of the times or more, 3 less.")
      .def("lengths", &DraftText::lengths,
           "Tokens of the text's end that occur earlier in it, in the newer and in the older half of the recent texts.")
      .def_prop_ro(
          "tokens", [](const DraftText& draft) { return draft.text().size(); }, "Tokens of the text.")
      .def_prop_ro("bytes", &DraftText::bytes, "Memory held.");
}

}  // namespace hasten
