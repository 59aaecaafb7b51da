// One vector holds a word of 8 columns; a word of a row meets them all. Nothing is summed across lanes.
#include <immintrin.h>

#include "binary.h"
#include "binary_finish.h"

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
            _mm512_mask_cvtepi64_storeu_epi32(p.y + (row + r) * p.pitch + column, mask, y);
        }
}

template <int rows>
void band(const BinaryProduct& p, std::ptrdiff_t row) {
    const std::ptrdiff_t blocks = (p.columns + binary_lanes - 1) / binary_lanes;
    std::ptrdiff_t block = 0;
    for (; block + most_blocks <= blocks; block += most_blocks) tile<rows, most_blocks>(p, row, block);
    for (; block < blocks; ++block) tile<rows, 1>(p, row, block);
}

void multiply(const BinaryProduct& p) {
    std::ptrdiff_t row = 0;
    for (; row + most_rows <= p.rows; row += most_rows) band<most_rows>(p, row);
    for (; row < p.rows; ++row) band<1>(p, row);
}

// Of the 8 pixels from `pixel` on, those that there are.
__mmask8 pixels_of(std::ptrdiff_t pixel, std::ptrdiff_t width) {
    return width - pixel >= binary_lanes ? 0xff : static_cast<__mmask8>((1 << (width - pixel)) - 1);
}

template <int channels, int vectors>
void area(const BinaryRow& r, std::ptrdiff_t channel, std::ptrdiff_t pixel) {
    __m512i sums[channels][vectors];
    for (int c = 0; c < channels; ++c)
        for (int v = 0; v < vectors; ++v) sums[c][v] = _mm512_setzero_si512();
    const std::uint64_t* const weights = r.weights + channel * r.steps;
    const std::uint64_t* const x = r.x + pixel;
    for (std::ptrdiff_t s = 0; s < r.steps; ++s) {
        __m512i pixels[vectors];
        for (int v = 0; v < vectors; ++v) pixels[v] = _mm512_loadu_si512(x + r.at[s] + v * binary_lanes);
        for (int c = 0; c < channels; ++c) {
            const __m512i w = _mm512_set1_epi64(static_cast<long long>(weights[c * r.steps + s]));
            for (int v = 0; v < vectors; ++v)
                sums[c][v] = _mm512_add_epi64(sums[c][v], _mm512_popcnt_epi64(_mm512_xor_si512(w, pixels[v])));
        }
    }
    for (int c = 0; c < channels; ++c) {
        const std::ptrdiff_t k = channel + c;
        const __m256 scale = _mm256_set1_ps(r.scale[k]), shift = _mm256_set1_ps(r.shift[k]);
        for (int v = 0; v < vectors; ++v) {
            const std::ptrdiff_t at = pixel + v * binary_lanes;
            const __mmask8 mask = pixels_of(at, r.width);
            const __m256i most = _mm256_maskz_loadu_epi32(mask, r.most + k * r.width + at);
            const __m256i differ = _mm512_cvtepi64_epi32(_mm512_slli_epi64(sums[c][v], 1));
            const __m256 sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(most, differ));
            _mm256_mask_storeu_ps(r.y + k * r.pitch + at, mask, _mm256_add_ps(_mm256_mul_ps(sum, scale), shift));
        }
    }
}

template <int vectors>
void strip(const BinaryRow& r, std::ptrdiff_t pixel) {
    constexpr int most_channels = vectors > 2 ? 4 : 8;  // 12 or 16 sums in registers, 8 of one vector
    std::ptrdiff_t channel = 0;
    for (; channel + most_channels <= r.channels; channel += most_channels)
        area<most_channels, vectors>(r, channel, pixel);
    for (; channel < r.channels; ++channel) area<1, vectors>(r, channel, pixel);
}

void convolve(const BinaryRow& r) {
    for (std::ptrdiff_t pixel = 0; pixel < r.width;) {
        const std::ptrdiff_t left = (r.width - pixel + binary_lanes - 1) / binary_lanes;
        switch (left < most_blocks ? left : most_blocks) {
            case 1: strip<1>(r, pixel); break;
            case 2: strip<2>(r, pixel); break;
            case 3: strip<3>(r, pixel); break;
            default: strip<4>(r, pixel);
        }
        pixel += most_blocks * binary_lanes;
    }
}

void pack_planes(const BinaryPlanes& b) {
    for (std::ptrdiff_t first = 0, w = 0; first < b.channels; first += 64, ++w) {
        const std::ptrdiff_t end = b.channels < first + 64 ? b.channels : first + 64;
        for (std::ptrdiff_t p = 0; p < b.width; p += 16) {
            const std::ptrdiff_t left = b.width - p;
            const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1 << left) - 1);
            __m512i low = _mm512_setzero_si512(), high = low, bit = _mm512_set1_epi64(1);
            for (std::ptrdiff_t c = first; c < end; ++c) {
                const __m512 x = _mm512_maskz_loadu_ps(mask, b.x + c * b.pitch + p);
                const __mmask16 up = _mm512_mask_cmp_ps_mask(mask, x, _mm512_setzero_ps(), _CMP_GE_OQ);
                low = _mm512_mask_or_epi64(low, static_cast<__mmask8>(up), low, bit);
                high = _mm512_mask_or_epi64(high, static_cast<__mmask8>(up >> 8), high, bit);
                bit = _mm512_slli_epi64(bit, 1);
            }
            std::uint64_t* const to = b.to + w * b.to_pitch + p;
            _mm512_mask_storeu_epi64(to, static_cast<__mmask8>(mask), low);
            if (left > 8) _mm512_mask_storeu_epi64(to + 8, static_cast<__mmask8>(mask >> 8), high);
        }
    }
}

void pack_rows(const float* x, std::ptrdiff_t rows, std::ptrdiff_t length, std::uint64_t* to) {
    for (std::ptrdiff_t i = 0; i < rows; ++i, x += length)
        for (std::ptrdiff_t first = 0; first < length; first += 64) {
            std::uint64_t word = 0;
            for (int part = 0; part < 64 && first + part < length; part += 16) {
                const std::ptrdiff_t left = length - first - part;
                const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1 << left) - 1);
                const __m512 values = _mm512_maskz_loadu_ps(mask, x + first + part);
                const __mmask16 up = _mm512_mask_cmp_ps_mask(mask, values, _mm512_setzero_ps(), _CMP_GE_OQ);
                word |= static_cast<std::uint64_t>(up) << part;
            }
            *to++ = word;
        }
}

const BinaryKernels kernels{multiply, convolve, pack_planes, pack_rows, finish};

}  // namespace

const BinaryKernels* binary_avx512_vpopcntdq() { return &kernels; }

}  // namespace bitsmith
