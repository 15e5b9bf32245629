// Eight rows side by side, for code outside isa/ that the compiler must vectorise for whatever machine it is on.
// A function marked HASTEN_CLONES is compiled for AVX512, AVX2 and the baseline, and the loader picks one.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 12 && !defined(__SANITIZE_ADDRESS__)
#define HASTEN_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define HASTEN_CLONES
#endif

#define HASTEN_INLINE inline __attribute__((always_inline))

namespace hasten {

constexpr int kLanes = 8;
using f32x8 = float __attribute__((vector_size(32)));
using i32x8 = int32_t __attribute__((vector_size(32)));

HASTEN_INLINE f32x8 load8(const float* p) {
  f32x8 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
HASTEN_INLINE void store8(float* p, f32x8 v) { std::memcpy(p, &v, sizeof v); }
HASTEN_INLINE f32x8 all8(float v) { return f32x8{v, v, v, v, v, v, v, v}; }
HASTEN_INLINE i32x8 bits_of(f32x8 v) { return reinterpret_cast<i32x8>(v); }
HASTEN_INLINE f32x8 float_of(i32x8 v) { return reinterpret_cast<f32x8>(v); }
HASTEN_INLINE f32x8 abs8(f32x8 v) { return float_of(bits_of(v) & 0x7fffffff); }
HASTEN_INLINE f32x8 min8(f32x8 a, f32x8 b) { return a < b ? a : b; }
HASTEN_INLINE f32x8 max8(f32x8 a, f32x8 b) { return a > b ? a : b; }

// Round to nearest even for |v| < 2^22, by the adder.
HASTEN_INLINE f32x8 round8(f32x8 v) { return (v + 0x1.8p23f) - 0x1.8p23f; }

}  // namespace hasten
