// 256-bit vectors: what AVX2 and AVX-VNNI share. A derived set adds the dot products.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "layer.h"

namespace {

struct Ymm {
    using Int = __m256i;
    using Sum = int __attribute__((vector_size(32)));
    using Real = __m256;
    using Word = __m256i;
    static constexpr int lanes = 8;
    static constexpr int words = 16;
    static constexpr int rows = 6;  // 6 x 2 accumulators of 16 registers
    template <int Tile>
    static constexpr int column_rows = 0;  // too few registers for the taps of a column

    static Int load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static Int load(const std::int32_t* p) { return load(static_cast<const void*>(p)); }
    static Real load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, Real a) { _mm256_storeu_ps(p, a); }
    static Int broadcast(const std::uint8_t* p) {
        int four;
        std::memcpy(&four, p, 4);
        return _mm256_set1_epi32(four);
    }

    // no masked byte loads here: a part goes through 16 bytes on the stack
    template <bool Signed, bool Partial>
    static Word widen(const std::uint8_t* p, int count) {
        __m128i bytes;
        if constexpr (Partial)
            bytes = part(p, count);
        else
            bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return Signed ? _mm256_cvtepi8_epi16(bytes) : _mm256_cvtepu8_epi16(bytes);
    }
    static __m128i part(const std::uint8_t* p, int count) {
        alignas(16) std::uint8_t bytes[16] = {};
        std::memcpy(bytes, p, static_cast<std::size_t>(count));
        return _mm_load_si128(reinterpret_cast<const __m128i*>(bytes));
    }
    static Word word(int a) { return _mm256_set1_epi16(static_cast<short>(a)); }
    static Word add16(Word a, Word b) { return _mm256_add_epi16(a, b); }
    static Word sub16(Word a, Word b) { return _mm256_sub_epi16(a, b); }
    template <int N>
    static Word shift16(Word a) {
        return _mm256_slli_epi16(a, N);
    }
    static Word scale16(Word a, Word b) { return _mm256_mulhrs_epi16(a, b); }
    static Word saturate8(Word a) {
        return _mm256_max_epi16(_mm256_min_epi16(a, _mm256_set1_epi16(127)), _mm256_set1_epi16(-128));
    }
    static Word load_words(const std::int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static void store_words(std::uint8_t* p, Word a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
    static void store_bytes_offset(std::uint8_t* p, Word a) {
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_xor_si128(bytes, _mm_set1_epi8(-128)));
    }

    static Real real(float a) { return _mm256_set1_ps(a); }
    static Real add(Real a, Real b) { return _mm256_add_ps(a, b); }
    static Real sub(Real a, Real b) { return _mm256_sub_ps(a, b); }
    static Real mul(Real a, Real b) { return _mm256_mul_ps(a, b); }
    static Real min(Real a, Real b) { return _mm256_min_ps(a, b); }
    static Real max(Real a, Real b) { return _mm256_max_ps(a, b); }
    static Real to_real(Int a) { return _mm256_cvtepi32_ps(a); }
    static Int to_int(Real a) { return _mm256_cvtps_epi32(a); }
    static Int integer(int a) { return _mm256_set1_epi32(a); }
    static Int add32(Int a, Int b) { return _mm256_add_epi32(a, b); }
    static Int sub32(Int a, Int b) { return _mm256_sub_epi32(a, b); }
    static Int load_levels(const std::uint8_t* p, bool is_signed, int count) {
        const __m128i bytes = count == lanes ? _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)) : part(p, count);
        return is_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes);
    }
    static void store_levels(std::uint8_t* p, Int a, int count) {
        const __m256i low_bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                                   0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
        const __m256i four = _mm256_shuffle_epi8(a, low_bytes);
        const __m128i bytes = _mm_unpacklo_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
        if (count == lanes)
            _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
        else
            std::memcpy(p, &bytes, static_cast<std::size_t>(count));
    }
};

}  // namespace
