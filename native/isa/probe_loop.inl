// What the peak loops share. Everything is local to the file that includes it, which compiles it for its own
// instruction set.
#include <cstddef>
#include <cstdint>

namespace hasten {
namespace {

// Keeps a value in its vector register and the compiler from knowing it.
template <typename T>
[[gnu::always_inline]] inline void opaque(T& value) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(value));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(value));
#else
  asm volatile("" : "+m"(value));
#endif
}

template <int... I>
struct Indices {};
using Eight = Indices<0, 1, 2, 3, 4, 5, 6, 7>;
using Twelve = Indices<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11>;
using Sixteen = Indices<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;

// `rounds` times step(sum) for each of as many independent sums as there are indices. Spelled out by a fold: GCC leaves
// an array that a loop walks over on the stack, even when it unrolls the loop, and then loads and stores are measured.
template <typename Vector, typename Step, int... I>
[[gnu::always_inline]] inline void repeat(int64_t rounds, Indices<I...>, Vector zero, Step step) {
  Vector sums[sizeof...(I)] = {((void)I, zero)...};
  for (int64_t r = 0; r < rounds; r++) ((step(sums[I]), opaque(sums[I])), ...);
}

// All of the data combined, read as kStreams interleaved streams of eight Vectors at a time.
template <int kStreams, typename Vector, int... I>
Vector read_streams(const uint8_t* data, size_t bytes, int ahead, Indices<I...>) {
  const size_t part = bytes / kStreams;
  Vector sums[sizeof...(I)] = {};
  for (size_t at = 0; at < part; at += sizeof(sums)) {
    for (int s = 0; s < kStreams; s++) {
      const uint8_t* line = data + s * part + at;
      if (ahead)
        for (size_t i = 0; i < sizeof(sums); i += 64) __builtin_prefetch(line + ahead + i);
      ((sums[I] ^= reinterpret_cast<const Vector*>(line)[I]), ...);
    }
  }
  return (sums[I] ^ ...);
}

// ProbeKernels::read with loads of one Vector, an aligned vector of integers.
template <typename Vector>
uint64_t read_by(const uint8_t* data, size_t bytes, int streams, int ahead) {
  const Vector all = streams == 4   ? read_streams<4, Vector>(data, bytes, ahead, Eight{})
                     : streams == 2 ? read_streams<2, Vector>(data, bytes, ahead, Eight{})
                                    : read_streams<1, Vector>(data, bytes, ahead, Eight{});
  uint64_t words[sizeof(Vector) / 8];
  __builtin_memcpy(words, &all, sizeof words);
  for (size_t i = 1; i < sizeof(Vector) / 8; i++) words[0] ^= words[i];
  return words[0];
}

}  // namespace
}  // namespace hasten
