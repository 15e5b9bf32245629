// A loop that is written out at compile time. gcc keeps an array of vector registers on the stack as long as any loop
// walks over it, `#pragma GCC unroll` or not; with constant indices the array lives in registers, three times as fast.
#pragma once

#include <type_traits>
#include <utility>

namespace hasten {

#ifdef HASTEN_SANITIZED
// Under the sanitizers every load is checked: written out, one kernel file takes minutes and gigabytes to compile.
template <int N, typename Fn>
void repeat(Fn&& fn) {
  for (int i = 0; i < N; i++) fn(i);
}
#else
// fn(integral_constant<int, 0>), ..., fn(integral_constant<int, N - 1>)
template <int N, typename Fn>
[[gnu::always_inline]] inline void repeat(Fn&& fn) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (fn(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}
#endif

}  // namespace hasten

// A lambda body for repeat() that must disappear into its caller.
#ifdef HASTEN_SANITIZED
#define HASTEN_EACH(i) [&](auto i)
#else
#define HASTEN_EACH(i) [&](auto i) __attribute__((always_inline))
#endif
