#include "bind.h"

NB_MODULE(_native, m) {
  nanobind::set_leak_warnings(false);  // what a traceback still holds when Python ends is no leak
  m.doc() = "Hasten's native engine: kernels, decoder, sampler, packing and measured ceilings.";
  hasten::bind_engine(m);
  hasten::bind_kernels(m);
  hasten::bind_int_ways(m);
  hasten::bind_pack(m);
  hasten::bind_sampler(m);
  hasten::bind_sequence_sampler(m);
  hasten::bind_divergence(m);
  hasten::bind_probe(m);
  hasten::bind_draft(m);
}
