// Loops unrolled by the language, so that no compiler's heuristics decide whether an array stays in registers.
// Everything in simd/ is in an anonymous namespace: a function compiled for AVX-512 must never be merged by the linker
// with the same function of another translation unit.
#pragma once

#include <utility>

namespace {

template <class F, int... I>
[[gnu::always_inline]] inline void unroll_over(std::integer_sequence<int, I...>, const F& f) {
    (f(std::integral_constant<int, I>{}), ...);
}

// f(0), f(1), ..., f(N - 1) with compile-time indices
template <int N, class F>
[[gnu::always_inline]] inline void unroll(const F& f) {
    unroll_over(std::make_integer_sequence<int, N>{}, f);
}

}  // namespace
