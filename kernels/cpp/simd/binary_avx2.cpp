// As in AVX-512, with the ones of each half byte from a table (Mula, Kurz and Lemire 2018, doi:10.1093/comjnl/bxx046).
#include <immintrin.h>

#include "binary.h"
#include "binary_finish.h"

namespace bitsmith {

namespace {

constexpr int halves = 2;       // vectors of 4 columns in a block
constexpr int most_rows = 2;
constexpr std::ptrdiff_t before_full = 31;  // words, of at most 8 ones a byte each, until a byte is full

// The ones of each byte.
inline __m256i ones(__m256i x) {
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2,
                                           3, 2, 3, 3, 4);
    const __m256i low = _mm256_set1_epi8(15);
    return _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(x, low)),
                           _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), low)));
}

template <int rows>
void tile(const BinaryProduct& p, std::ptrdiff_t row, std::ptrdiff_t block) {
    const __m256i zero = _mm256_setzero_si256();
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
                    bytes[r][h] = _mm256_add_epi8(bytes[r][h], ones(_mm256_xor_si256(x, column)));
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
                    p.y[(row + r) * p.pitch + column] = p.length - 2 * static_cast<std::int32_t>(counts[lane]);
            }
        }
}

void multiply(const BinaryProduct& p) {
    const std::ptrdiff_t blocks = (p.columns + binary_lanes - 1) / binary_lanes;
    std::ptrdiff_t row = 0;
    for (; row + most_rows <= p.rows; row += most_rows)
        for (std::ptrdiff_t block = 0; block < blocks; ++block) tile<most_rows>(p, row, block);
    for (; row < p.rows; ++row)
        for (std::ptrdiff_t block = 0; block < blocks; ++block) tile<1>(p, row, block);
}

template <int channels>
void area(const BinaryRow& r, std::ptrdiff_t channel, std::ptrdiff_t pixel) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i sums[channels][halves], bytes[channels][halves];
    for (int c = 0; c < channels; ++c)
        for (int h = 0; h < halves; ++h) sums[c][h] = zero;
    const std::uint64_t* const weights = r.weights + channel * r.steps;
    const std::uint64_t* const x = r.x + pixel;
    for (std::ptrdiff_t begin = 0; begin < r.steps; begin += before_full) {
        const std::ptrdiff_t end = begin + before_full < r.steps ? begin + before_full : r.steps;
        for (int c = 0; c < channels; ++c)
            for (int h = 0; h < halves; ++h) bytes[c][h] = zero;
        for (std::ptrdiff_t s = begin; s < end; ++s)
            for (int h = 0; h < halves; ++h) {
                const __m256i pixels = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + r.at[s] + h * 4));
                for (int c = 0; c < channels; ++c) {
                    const __m256i w = _mm256_set1_epi64x(static_cast<long long>(weights[c * r.steps + s]));
                    bytes[c][h] = _mm256_add_epi8(bytes[c][h], ones(_mm256_xor_si256(w, pixels)));
                }
            }
        for (int c = 0; c < channels; ++c)
            for (int h = 0; h < halves; ++h)
                sums[c][h] = _mm256_add_epi64(sums[c][h], _mm256_sad_epu8(bytes[c][h], zero));
    }
    for (int c = 0; c < channels; ++c) {
        const std::ptrdiff_t k = channel + c;
        for (int h = 0; h < halves; ++h) {
            alignas(32) std::uint64_t counts[4];
            _mm256_store_si256(reinterpret_cast<__m256i*>(counts), sums[c][h]);
            for (int lane = 0; lane < 4; ++lane) {
                const std::ptrdiff_t p = pixel + h * 4 + lane;
                if (p >= r.width) break;
                const std::int32_t sum = r.most[k * r.width + p] - 2 * static_cast<std::int32_t>(counts[lane]);
                r.y[k * r.pitch + p] = static_cast<float>(sum) * r.scale[k] + r.shift[k];
            }
        }
    }
}

void convolve(const BinaryRow& r) {
    for (std::ptrdiff_t pixel = 0; pixel < r.width; pixel += binary_lanes) {
        std::ptrdiff_t channel = 0;
        for (; channel + most_rows <= r.channels; channel += most_rows) area<most_rows>(r, channel, pixel);
        for (; channel < r.channels; ++channel) area<1>(r, channel, pixel);
    }
}

void pack_planes(const BinaryPlanes& b) {
    for (std::ptrdiff_t first = 0, w = 0; first < b.channels; first += 64, ++w) {
        const std::ptrdiff_t end = b.channels < first + 64 ? b.channels : first + 64;
        std::uint64_t* const to = b.to + w * b.to_pitch;
        std::ptrdiff_t p = 0;
        for (; p + 8 <= b.width; p += 8) {
            __m256i low = _mm256_setzero_si256(), high = low, bit = _mm256_set1_epi64x(1);
            for (std::ptrdiff_t c = first; c < end; ++c) {
                const __m256 x = _mm256_loadu_ps(b.x + c * b.pitch + p);
                const __m256i up = _mm256_castps_si256(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GE_OQ));
                const __m256i four[2] = {_mm256_cvtepi32_epi64(_mm256_castsi256_si128(up)),
                                         _mm256_cvtepi32_epi64(_mm256_extracti128_si256(up, 1))};
                low = _mm256_or_si256(low, _mm256_and_si256(four[0], bit));
                high = _mm256_or_si256(high, _mm256_and_si256(four[1], bit));
                bit = _mm256_slli_epi64(bit, 1);
            }
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + p), low);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + p + 4), high);
        }
        for (; p < b.width; ++p) {
            std::uint64_t word = 0;
            for (std::ptrdiff_t c = first; c < end; ++c)
                word |= static_cast<std::uint64_t>(b.x[c * b.pitch + p] >= 0) << (c - first);
            to[p] = word;
        }
    }
}

void pack_rows(const float* x, std::ptrdiff_t rows, std::ptrdiff_t length, std::uint64_t* to) {
    for (std::ptrdiff_t i = 0; i < rows; ++i, x += length)
        for (std::ptrdiff_t first = 0; first < length; first += 64) {
            const std::ptrdiff_t end = length < first + 64 ? length : first + 64;
            std::uint64_t word = 0;
            std::ptrdiff_t c = first;
            for (; c + 8 <= end; c += 8) {
                const __m256 up = _mm256_cmp_ps(_mm256_loadu_ps(x + c), _mm256_setzero_ps(), _CMP_GE_OQ);
                word |= static_cast<std::uint64_t>(_mm256_movemask_ps(up)) << (c - first);
            }
            for (; c < end; ++c) word |= static_cast<std::uint64_t>(x[c] >= 0) << (c - first);
            *to++ = word;
        }
}

const BinaryKernels kernels{multiply, convolve, pack_planes, pack_rows, finish};

}  // namespace

const BinaryKernels* binary_avx2() { return &kernels; }

}  // namespace bitsmith
