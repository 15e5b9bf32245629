// Memory for weights: huge pages where the system gives them, since a step reads all of it.
#pragma once

#include <cstddef>
#include <cstdint>
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

}  // namespace hasten
