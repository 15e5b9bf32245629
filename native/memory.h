// Memory for weights: huge pages where the system gives them, since a step reads all of it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hasten {

// Zero-filled, 2 MB aligned. Throws std::bad_alloc.
uint8_t* allocate_huge(size_t bytes);
void free_huge(uint8_t* memory, size_t bytes);

}  // namespace hasten
