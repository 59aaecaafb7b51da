// The accumulator bound: why no sum leaves int32.
//
// acc[p, k] = base[p, k] + sum over c of V[p, c] * U[p, k, c]. Every partial sum, in any order, is at most
//     S = |base[p, k]| + sum over c of max|V[p, c]| * |U[p, k, c]|
// in absolute value, because each term is; base, which it begins with, is 0 but at tap (1, 1). A layer is accepted only
// if S < 2^31 for every p and k; then
//   - scalar code, vpmaddwd + vpaddd (whose sums of two are such partial sums) and vpdpwssd never overflow;
//   - vpdpbusd works on V + 128 and starts from base - 128 * sum(U). Its partial sums may leave int32, but it wraps modulo
//     2^32 (it does not saturate), and the last value is acc itself, which fits: the result is exact.
//
// bits = 8: |V| <= 128 and |U| <= 127 whatever the data is, so S <= |base| + C * 128 * 127: without an offset C <= 132104.
// bits = 16: |V[p, c]| <= Vmax[p, c] by interval arithmetic. d = x - zero lies in [-zero, 255 - zero] (0, the value
// outside the image, is in it), D = sum of coefficients times d, and V grows with D: its extremes come from those of D.
// For the same reason |D| <= 255 * 4 (tile 2) or 255 * 100 (tile 4), so int16 holds every D, and every
// D - offset: the offset is a value that D can have.
#pragma once

#include <cstdint>

namespace bitsmith {

// B^T of the tile, T x T
const int* input_transform(int tile);

// The one tap (row 1, column 1) at which B^T keeps the mean of a tile, and by which factor: the other rows sum to 0.
constexpr int mean_tap(int tile) { return tile + 3; }
constexpr int mean_gain(int tile) { return tile == 2 ? 2 * 2 : 6 * 6; }

// Least and greatest D[tap] over all images; zero is that of unsigned x.
struct Interval {
    std::int64_t low, high;
};
Interval interval_of(int tile, int tap, int zero);

// A bound of |V[tap]| for D - offset of such an interval.
std::int64_t largest_v(const Interval& d, int bits, int mul, int offset);

}  // namespace bitsmith
