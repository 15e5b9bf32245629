// XXH64 (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md): a checksum at memory speed, so that every
// start can afford to verify an artifact.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hasten {

uint64_t xxh64(const uint8_t* data, size_t bytes, uint64_t seed);

}  // namespace hasten
