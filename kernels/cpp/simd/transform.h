// The one-dimensional transforms (Lavin & Gray 2016, arXiv:1509.09308), applied in place along a stride.
#pragma once

#include "unroll.h"

namespace {

// Input: B^T d in int16. Exact modulo 2^16, and every result is within +-25500.
template <class S, int Tile, int Stride>
[[gnu::always_inline]] inline void transform_input(typename S::Word* d) {
    using W = typename S::Word;
    if constexpr (Tile == 2) {
        const W d0 = d[0], d1 = d[Stride], d2 = d[2 * Stride], d3 = d[3 * Stride];
        d[0] = S::sub16(d0, d2);
        d[Stride] = S::add16(d1, d2);
        d[2 * Stride] = S::sub16(d2, d1);
        d[3 * Stride] = S::sub16(d1, d3);
    } else {
        const W d0 = d[0], d1 = d[Stride], d2 = d[2 * Stride], d3 = d[3 * Stride], d4 = d[4 * Stride];
        const W d5 = d[5 * Stride];
        const W four1 = S::template shift16<2>(d1), four2 = S::template shift16<2>(d2);
        const W five2 = S::add16(four2, d2), five3 = S::add16(S::template shift16<2>(d3), d3);
        const W even = S::sub16(d4, four2), odd = S::sub16(d3, four1);
        const W even2 = S::sub16(d4, d2), odd2 = S::template shift16<1>(S::sub16(d3, d1));
        d[0] = S::add16(S::sub16(S::template shift16<2>(d0), five2), d4);
        d[Stride] = S::add16(even, odd);
        d[2 * Stride] = S::sub16(even, odd);
        d[3 * Stride] = S::add16(even2, odd2);
        d[4 * Stride] = S::sub16(even2, odd2);
        d[5 * Stride] = S::add16(S::sub16(four1, five3), d5);
    }
}

// Output: A^T f in float32, in the order that the contract fixes; f(i) gives the i-th value.
template <class S, int Tile, int Stride, class F>
[[gnu::always_inline]] inline void transform_output(const F& f, typename S::Real* o) {
    using R = typename S::Real;
    const R f1 = f(1), f2 = f(2);
    const R sum = S::add(f1, f2), difference = S::sub(f1, f2);
    if constexpr (Tile == 2) {
        o[0] = S::add(f(0), sum);
        o[Stride] = S::sub(difference, f(3));
    } else {
        const R f3 = f(3), f4 = f(4);
        const R sum2 = S::add(f3, f4), difference2 = S::sub(f3, f4);
        o[0] = S::add(S::add(f(0), sum), sum2);
        o[Stride] = S::add(difference, S::mul(difference2, S::real(2)));
        o[2 * Stride] = S::add(sum, S::mul(sum2, S::real(4)));
        o[3 * Stride] = S::add(S::add(difference, S::mul(difference2, S::real(8))), f(5));
    }
}

}  // namespace
