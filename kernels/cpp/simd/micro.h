// The matrix products: rows of V times a block of output channels, for one tap, or for the taps of one column and with
// the output transform down it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "transform.h"
#include "unroll.h"

namespace {

constexpr std::ptrdiff_t prefetch_ahead = 24576;  // bytes: transformed weights are many times the caches

// R rows x N columns of lanes. Accumulators stay in registers for the whole sum (the tests disassemble this function).
// Products leave as float32(acc) * us: us is loaded once for all rows here, and once per row anywhere later.
template <class S, bool Bytes, int R, int N>
[[gnu::noinline]] void micro(const std::uint8_t* a, std::ptrdiff_t row, const std::uint8_t* b, std::ptrdiff_t groups,
                             const std::int32_t* start, const float* us, float* out) {
    // Sum is a vector of int32 and not S::Int: gcc 12 keeps a second copy of each, on the stack, where the types differ
    // between the loop and what follows it.
    typename S::Sum acc[R][N];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < N; ++j) acc[i][j] = (typename S::Sum)S::load(start + j * S::lanes);
    const std::uint8_t* third[(R + 2) / 3];  // a pointer for every third row: one for each would not fit in registers
#pragma GCC unroll 16
    for (int i = 0; i < R; i += 3) third[i / 3] = a + i * row;
    for (; groups > 0; --groups) {
        typename S::Int w[N];
#pragma GCC unroll 16
        for (int j = 0; j < N; ++j) {
            w[j] = S::load(b + j * S::lanes * 4);
            __builtin_prefetch(b + prefetch_ahead + j * S::lanes * 4, 0, 2);  // into the second level
        }
        b += N * S::lanes * 4;
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
            const typename S::Int v = S::broadcast(third[i / 3] + i % 3 * row);
#pragma GCC unroll 16
            for (int j = 0; j < N; ++j) acc[i][j] = S::template dot<Bytes>(acc[i][j], v, w[j]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < R; i += 3) third[i / 3] += 4;
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < N; ++j)
            S::store(out + (i * N + j) * S::lanes,
                     S::mul(S::to_real((typename S::Int)acc[i][j]), S::load(us + j * S::lanes)));
}

// Without it gcc reads a vector of weights from memory for each of its few uses.
template <class V>
[[gnu::always_inline]] inline void in_register(V& v) {
    __asm__("" : "+v"(v));
}

// The T taps of a column x R tiles x N columns of lanes, and A^T down it: half of the stores of `micro`, which take the
// time of products where channels are few, and of the loads later. Each weight serves R tiles only, so the weights of
// the column have to lie in the first-level cache.
template <class S, bool Bytes, int Tile, int R, int N>
[[gnu::noinline]] void micro_column(const std::uint8_t* a, std::ptrdiff_t tap, std::ptrdiff_t row,
                                    const std::uint8_t* b, std::ptrdiff_t groups, const std::int32_t* start,
                                    const float* us, float* out, std::ptrdiff_t out_row) {
    constexpr int T = Tile + 2;
    typename S::Sum acc[T][R][N];
    const std::uint8_t* v[T];
#pragma GCC unroll 16
    for (int i = 0; i < T; ++i) {
        v[i] = a + i * tap;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
            for (int j = 0; j < N; ++j) acc[i][r][j] = (typename S::Sum)S::load(start + (i * N + j) * S::lanes);
    }
    for (; groups > 0; --groups) {
#pragma GCC unroll 16
        for (int i = 0; i < T; ++i) {
            typename S::Int w[N];
#pragma GCC unroll 16
            for (int j = 0; j < N; ++j) {
                w[j] = S::load(b + (i * N + j) * S::lanes * 4);
                in_register(w[j]);
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const typename S::Int one = S::broadcast(v[i] + r * row);
#pragma GCC unroll 16
                for (int j = 0; j < N; ++j) acc[i][r][j] = S::template dot<Bytes>(acc[i][r][j], one, w[j]);
            }
            v[i] += 4;
        }
        b += T * N * S::lanes * 4;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int j = 0; j < N; ++j) {
            const auto product = [&](int i) __attribute__((always_inline)) {
                return S::mul(S::to_real((typename S::Int)acc[i][r][j]), S::load(us + (i * N + j) * S::lanes));
            };
            typename S::Real o[Tile];
            transform_output<S, Tile, 1>(product, o);
#pragma GCC unroll 16
            for (int i = 0; i < Tile; ++i) S::store(out + i * out_row + (r * N + j) * S::lanes, o[i]);
        }
}

using Micro = void (*)(const std::uint8_t*, std::ptrdiff_t, const std::uint8_t*, std::ptrdiff_t, const std::int32_t*,
                       const float*, float*);

template <class S, bool Bytes, int N, class Rows>
struct Micros;

template <class S, bool Bytes, int N, int... R>
struct Micros<S, Bytes, N, std::integer_sequence<int, R...>> {
    static constexpr Micro of[] = {micro<S, Bytes, R + 1, N>...};
};

// Any number of rows, in nearly equal shares of at most S::rows.
template <class S, bool Bytes, int N>
void product(std::ptrdiff_t rows, const std::uint8_t* a, std::ptrdiff_t row, const std::uint8_t* b,
             std::ptrdiff_t groups, const std::int32_t* start, const float* us, float* out) {
    const std::ptrdiff_t shares = (rows + S::rows - 1) / S::rows;
    for (std::ptrdiff_t s = 0, done = 0; s < shares; ++s) {
        const std::ptrdiff_t now = rows / shares + (s < rows % shares);
        Micros<S, Bytes, N, std::make_integer_sequence<int, S::rows>>::of[now - 1](
            a + done * row, row, b, groups, start, us, out + done * N * S::lanes);
        done += now;
    }
}

// The same for the taps of a column, in shares of `rows` and a rest.
template <class S, bool Bytes, int Tile, int N>
void product_column(std::ptrdiff_t rows, const std::uint8_t* a, std::ptrdiff_t tap, std::ptrdiff_t row,
                    const std::uint8_t* b, std::ptrdiff_t groups, const std::int32_t* start, const float* us,
                    float* out, std::ptrdiff_t out_row) {
    constexpr int most = S::template column_rows<Tile>;
    std::ptrdiff_t done = 0;
    for (; done + most <= rows; done += most)
        micro_column<S, Bytes, Tile, most, N>(a + done * row, tap, row, b, groups, start, us,
                                              out + done * N * S::lanes, out_row);
    const auto rest = rows - done == 2 ? micro_column<S, Bytes, Tile, 2, N> : micro_column<S, Bytes, Tile, 1, N>;
    if (done < rows) rest(a + done * row, tap, row, b, groups, start, us, out + done * N * S::lanes, out_row);
}

}  // namespace
