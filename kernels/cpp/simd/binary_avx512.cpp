// One vector holds a word of 8 columns; a word of a row meets them all. Nothing is summed across lanes.
#include <immintrin.h>

#include "binary.h"

namespace bitsmith {

namespace {

constexpr int most_rows = 4, most_blocks = 4;  // 16 sums in registers

template <int rows, int blocks>
void tile(const BinaryProduct& p, std::ptrdiff_t row, std::ptrdiff_t block) {
    __m512i sums[rows][blocks];
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < blocks; ++c) sums[r][c] = _mm512_setzero_si512();
    const std::uint64_t* a = p.a + row * p.words;
    const std::uint64_t* b = p.b + block * p.words * binary_lanes;
    for (std::ptrdiff_t k = 0; k < p.words; ++k) {
        __m512i columns[blocks];
        for (int c = 0; c < blocks; ++c)
            columns[c] = _mm512_loadu_si512(b + (c * p.words + k) * binary_lanes);
        for (int r = 0; r < rows; ++r) {
            const __m512i x = _mm512_set1_epi64(static_cast<long long>(a[r * p.words + k]));
            for (int c = 0; c < blocks; ++c)
                sums[r][c] = _mm512_add_epi64(sums[r][c], _mm512_popcnt_epi64(_mm512_xor_si512(x, columns[c])));
        }
    }
    const __m512i length = _mm512_set1_epi64(p.length);
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < blocks; ++c) {
            const __m512i y = _mm512_sub_epi64(length, _mm512_slli_epi64(sums[r][c], 1));
            const std::ptrdiff_t column = (block + c) * binary_lanes, left = p.columns - column;
            const __mmask8 mask = left >= binary_lanes ? 0xff : static_cast<__mmask8>((1 << left) - 1);
            _mm512_mask_cvtepi64_storeu_epi32(p.y + (row + r) * p.columns + column, mask, y);
        }
}

template <int rows>
void band(const BinaryProduct& p, std::ptrdiff_t row) {
    const std::ptrdiff_t blocks = (p.columns + binary_lanes - 1) / binary_lanes;
    std::ptrdiff_t block = 0;
    for (; block + most_blocks <= blocks; block += most_blocks) tile<rows, most_blocks>(p, row, block);
    for (; block < blocks; ++block) tile<rows, 1>(p, row, block);
}

void run(const BinaryProduct& p) {
    std::ptrdiff_t row = 0;
    for (; row + most_rows <= p.rows; row += most_rows) band<most_rows>(p, row);
    for (; row < p.rows; ++row) band<1>(p, row);
}

}  // namespace

BinaryKernel binary_avx512_vpopcntdq() { return run; }

}  // namespace bitsmith
