// As in AVX-512, with the ones of each half byte from a table (Mula, Kurz and Lemire 2018, doi:10.1093/comjnl/bxx046).
#include <immintrin.h>

#include "binary.h"

namespace bitsmith {

namespace {

constexpr int halves = 2;       // vectors of 4 columns in a block
constexpr int most_rows = 2;
constexpr std::ptrdiff_t before_full = 31;  // words, of at most 8 ones a byte each, until a byte is full

template <int rows>
void tile(const BinaryProduct& p, std::ptrdiff_t row, std::ptrdiff_t block) {
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2,
                                           3, 2, 3, 3, 4);
    const __m256i low = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    __m256i sums[rows][halves], bytes[rows][halves];
    for (int r = 0; r < rows; ++r)
        for (int h = 0; h < halves; ++h) sums[r][h] = zero;
    const std::uint64_t* a = p.a + row * p.words;
    const std::uint64_t* b = p.b + block * p.words * binary_lanes;
    for (std::ptrdiff_t begin = 0; begin < p.words; begin += before_full) {
        const std::ptrdiff_t end = begin + before_full < p.words ? begin + before_full : p.words;
        for (int r = 0; r < rows; ++r)
            for (int h = 0; h < halves; ++h) bytes[r][h] = zero;
        for (std::ptrdiff_t k = begin; k < end; ++k)
            for (int h = 0; h < halves; ++h) {
                const __m256i column =
                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + k * binary_lanes + h * 4));
                for (int r = 0; r < rows; ++r) {
                    const __m256i x = _mm256_set1_epi64x(static_cast<long long>(a[r * p.words + k]));
                    const __m256i apart = _mm256_xor_si256(x, column);
                    const __m256i first = _mm256_shuffle_epi8(table, _mm256_and_si256(apart, low));
                    const __m256i second =
                        _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(apart, 4), low));
                    bytes[r][h] = _mm256_add_epi8(bytes[r][h], _mm256_add_epi8(first, second));
                }
            }
        for (int r = 0; r < rows; ++r)
            for (int h = 0; h < halves; ++h)
                sums[r][h] = _mm256_add_epi64(sums[r][h], _mm256_sad_epu8(bytes[r][h], zero));
    }
    for (int r = 0; r < rows; ++r)
        for (int h = 0; h < halves; ++h) {
            alignas(32) std::uint64_t counts[4];
            _mm256_store_si256(reinterpret_cast<__m256i*>(counts), sums[r][h]);
            for (int lane = 0; lane < 4; ++lane) {
                const std::ptrdiff_t column = block * binary_lanes + h * 4 + lane;
                if (column < p.columns)
                    p.y[(row + r) * p.columns + column] = p.length - 2 * static_cast<std::int32_t>(counts[lane]);
            }
        }
}

void run(const BinaryProduct& p) {
    const std::ptrdiff_t blocks = (p.columns + binary_lanes - 1) / binary_lanes;
    std::ptrdiff_t row = 0;
    for (; row + most_rows <= p.rows; row += most_rows)
        for (std::ptrdiff_t block = 0; block < blocks; ++block) tile<most_rows>(p, row, block);
    for (; row < p.rows; ++row)
        for (std::ptrdiff_t block = 0; block < blocks; ++block) tile<1>(p, row, block);
}

}  // namespace

BinaryKernel binary_avx2() { return run; }

}  // namespace bitsmith
