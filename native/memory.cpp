#include "memory.h"

#include <sys/mman.h>

#include <new>

namespace hasten {
namespace {

constexpr size_t kHuge = size_t{2} << 20;

size_t rounded(size_t bytes) { return (bytes + kHuge - 1) / kHuge * kHuge; }

}  // namespace

uint8_t* allocate_huge(size_t bytes) {
  const size_t want = rounded(bytes ? bytes : 1);
  void* raw = mmap(nullptr, want + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  const auto start = reinterpret_cast<uintptr_t>(raw), aligned = (start + kHuge - 1) / kHuge * kHuge;
  if (aligned > start) munmap(raw, aligned - start);
  if (aligned + want < start + want + kHuge) munmap(reinterpret_cast<void*>(aligned + want), start + kHuge - aligned);
#ifdef MADV_HUGEPAGE
  madvise(reinterpret_cast<void*>(aligned), want, MADV_HUGEPAGE);  // best effort: without it only TLB misses rise
#endif
  return reinterpret_cast<uint8_t*>(aligned);
}

void free_huge(uint8_t* memory, size_t bytes) { munmap(memory, rounded(bytes ? bytes : 1)); }

}  // namespace hasten
