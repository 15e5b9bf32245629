// Arrays that come from Python to be read, and arrays that are made here and handed over.
#pragma once

#include <initializer_list>
#include <memory>
#include <string>

#include "bind.h"

namespace hasten {

template <typename T, size_t N>
using Input = nb::ndarray<nb::numpy, const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

template <typename T>
using Owned = nb::ndarray<nb::numpy, T>;

template <typename T>
Owned<T> owned(std::unique_ptr<T[]> values, std::initializer_list<size_t> shape) {
  T* data = values.release();
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return Owned<T>(data, shape, owner);
}

inline void require(bool ok, const std::string& what) {
  if (!ok) throw nb::value_error(what.c_str());
}

}  // namespace hasten
