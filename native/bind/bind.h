// One bind_* function a file of this folder; module.cpp calls them all.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

namespace hasten {

namespace nb = nanobind;

template <typename T, size_t N>
using Array = nb::ndarray<nb::numpy, T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

void bind_engine(nb::module_& m);            // decoder, kernels, threads
void bind_kernels(nb::module_& m);           // single kernels, for tests
void bind_int_ways(nb::module_& m);          // ways of integer kernels, timed and chosen
void bind_pack(nb::module_& m);              // pack, unpack, ggml conversion
void bind_sequence_sampler(nb::module_& m);  // sampling of many sequences, with masks and penalties
void bind_divergence(nb::module_& m);        // KL, NLL, top-1 over rows of logits
void bind_probe(nb::module_& m);             // measured ceilings
void bind_draft(nb::module_& m);             // drafts for speculation

}  // namespace hasten
