#include "bind.h"
#include "calls.h"

namespace hasten {
namespace {

void translate(const std::exception_ptr& error, void*) {
  try {
    std::rethrow_exception(error);
  } catch (const BusyError& busy) {
    const nb::object kind = nb::module_::import_("hasten.errors").attr("UsageError");
    const nb::object made = kind(busy.what(), nb::arg("hint") = busy.hint);
    PyErr_SetObject(kind.ptr(), made.ptr());
  }
}

}  // namespace
}  // namespace hasten

NB_MODULE(_native, m) {
  nanobind::set_leak_warnings(false);  // what a traceback still holds when Python ends is no leak
  m.doc() = "Hasten's native engine: kernels, decoder, sampler, packing and measured ceilings.";
  nanobind::register_exception_translator(hasten::translate);
  hasten::bind_engine(m);
  hasten::bind_kernels(m);
  hasten::bind_int_ways(m);
  hasten::bind_pack(m);
  hasten::bind_sequence_sampler(m);
  hasten::bind_divergence(m);
  hasten::bind_probe(m);
  hasten::bind_draft(m);
}
