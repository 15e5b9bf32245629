// Memory for weights: huge pages where the system gives them, since a step reads all of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace hasten {

// Zero-filled, 2 MB aligned. Throws std::bad_alloc.
uint8_t* allocate_huge(size_t bytes);
void free_huge(uint8_t* memory, size_t bytes);

// Buffers of a step: rows are megabytes long, and with 4 KB pages every row of a tile would miss the TLB.
template <typename T>
struct HugeAllocator {
  using value_type = T;
  HugeAllocator() = default;
  template <typename U>
  HugeAllocator(const HugeAllocator<U>&) {}
  T* allocate(size_t n) { return reinterpret_cast<T*>(allocate_huge(n * sizeof(T))); }
  void deallocate(T* p, size_t n) { free_huge(reinterpret_cast<uint8_t*>(p), n * sizeof(T)); }
  template <typename U>
  bool operator==(const HugeAllocator<U>&) const {
    return true;
  }
};

template <typename T>
using HugeVector = std::vector<T, HugeAllocator<T>>;

// Begins at a cache line. Elsewhere every tile and every vector of 64 bytes lies in two.
template <typename T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  LineAllocator() = default;
  template <typename U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
  template <typename U>
  bool operator==(const LineAllocator<U>&) const {
    return true;
  }
};

template <typename T>
using LineVector = std::vector<T, LineAllocator<T>>;

}  // namespace hasten
