#include "bound.h"

#include <algorithm>
#include <cstdlib>

namespace bitsmith {

const int* input_transform(int tile) {
    static const int two[] = {1, 0, -1, 0, 0, 1, 1, 0, 0, -1, 1, 0, 0, 1, 0, -1};
    static const int four[] = {4, 0,  -5, 0, 1, 0, 0, -4, -4, 1,  1, 0, 0, 4, -4, -1, 1, 0,
                               0, -2, -1, 2, 1, 0, 0, 2,  -1, -2, 1, 0, 0, 4, 0,  -5, 0, 1};
    return tile == 2 ? two : four;
}

Interval interval_of(int tile, int tap, int zero) {
    const int size = tile + 2;
    const int* row = input_transform(tile) + tap / size * size;
    const int* column = input_transform(tile) + tap % size * size;
    std::int64_t positive = 0, negative = 0;
    for (int i = 0; i < size; ++i)
        for (int j = 0; j < size; ++j) {
            const int w = row[i] * column[j];
            (w > 0 ? positive : negative) += std::abs(w);
        }
    const std::int64_t low = -zero, high = 255 - zero;
    return {positive * low - negative * high, positive * high - negative * low};
}

std::int64_t largest_v(const Interval& d, int bits, int mul, int offset) {
    const auto scaled = [&](std::int64_t value) { return ((value - offset) * mul + (1 << 14)) >> 15; };
    const std::int64_t v = std::max(std::abs(scaled(d.low)), std::abs(scaled(d.high)));
    return bits == 8 ? std::min<std::int64_t>(v, 128) : v;
}

}  // namespace bitsmith
