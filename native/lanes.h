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

// e^v to 2 units in the last place for v up to 88; 0 below -87.3, where the result would be subnormal; NaN stays NaN.
// Range reduction by ln 2 in two parts, then the polynomial of Cephes' expf.
HASTEN_INLINE f32x8 exp8(f32x8 v) {
  constexpr float kLowest = -87.3f, kMagic = 0x1.8p23f;
  const f32x8 x = v > 88.0f ? all8(88.0f) : (v < kLowest ? all8(kLowest) : v);
  const f32x8 shifted = x * 1.44269504f + kMagic, n = shifted - kMagic;
  const f32x8 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  f32x8 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r) + 1.0f;
  const f32x8 power = float_of((bits_of(shifted) << 23) + 0x3f800000);
  return v < kLowest ? all8(0.0f) : p * power;
}

}  // namespace hasten
