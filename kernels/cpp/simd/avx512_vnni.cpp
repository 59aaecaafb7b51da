// 512-bit vectors: AVX-512 F, BW, DQ, VL and VNNI.
#include <immintrin.h>

#include <cstring>

#include "layer.h"

namespace {

struct Avx512Vnni {
    using Int = __m512i;
    using Sum = int __attribute__((vector_size(64)));
    using Real = __m512;
    using Word = __m512i;
    static constexpr int lanes = 16;
    static constexpr int words = 32;
    static constexpr int rows = 14;  // 14 x 2 accumulators, 2 of weights, 1 broadcast: 31 of 32 registers
    template <int Tile>
    static constexpr int column_rows = Tile == 2 ? 3 : 2;  // with the taps of a column, 24 accumulators
    static constexpr bool dots_bytes = true;

    static Int load(const void* p) { return _mm512_loadu_si512(p); }
    static Int load(const std::int32_t* p) { return _mm512_loadu_si512(p); }
    static Real load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, Real a) { _mm512_storeu_ps(p, a); }
    static Int broadcast(const std::uint8_t* p) {
        int four;
        std::memcpy(&four, p, 4);
        return _mm512_set1_epi32(four);
    }
    // four products and the sum wrap modulo 2^32 at most: no saturation on the way
    template <bool Bytes>
    static Sum dot(Sum acc, Int v, Int u) {
        return (Sum)(Bytes ? _mm512_dpbusd_epi32((Int)acc, v, u) : _mm512_dpwssd_epi32((Int)acc, v, u));
    }

    template <bool Signed, bool Partial>
    static Word widen(const std::uint8_t* p, int count) {
        __m256i bytes;
        if constexpr (Partial)
            bytes = _mm256_maskz_loadu_epi8(static_cast<__mmask32>((1ULL << count) - 1), p);
        else
            bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return Signed ? _mm512_cvtepi8_epi16(bytes) : _mm512_cvtepu8_epi16(bytes);
    }
    static Word word(int a) { return _mm512_set1_epi16(static_cast<short>(a)); }
    static Word add16(Word a, Word b) { return _mm512_add_epi16(a, b); }
    static Word sub16(Word a, Word b) { return _mm512_sub_epi16(a, b); }
    template <int N>
    static Word shift16(Word a) {
        return _mm512_slli_epi16(a, N);
    }
    static Word scale16(Word a, Word b) { return _mm512_mulhrs_epi16(a, b); }
    static Word load_words(const std::int16_t* p) { return _mm512_loadu_si512(p); }
    static void store_words(std::uint8_t* p, Word a) { _mm512_storeu_si512(p, a); }
    static void store_bytes_offset(std::uint8_t* p, Word a) {
        const __m256i offset = _mm256_xor_si256(_mm512_cvtsepi16_epi8(a), _mm256_set1_epi8(-128));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), offset);
    }

    static Real real(float a) { return _mm512_set1_ps(a); }
    static Real add(Real a, Real b) { return _mm512_add_ps(a, b); }
    static Real sub(Real a, Real b) { return _mm512_sub_ps(a, b); }
    static Real mul(Real a, Real b) { return _mm512_mul_ps(a, b); }
    static Real min(Real a, Real b) { return _mm512_min_ps(a, b); }
    static Real max(Real a, Real b) { return _mm512_max_ps(a, b); }
    static Real to_real(Int a) { return _mm512_cvtepi32_ps(a); }
    static Int to_int(Real a) { return _mm512_cvtps_epi32(a); }
    static Int integer(int a) { return _mm512_set1_epi32(a); }
    static Int add32(Int a, Int b) { return _mm512_add_epi32(a, b); }
    static Int sub32(Int a, Int b) { return _mm512_sub_epi32(a, b); }
    static Int load_levels(const std::uint8_t* p, bool is_signed, int count) {
        const __m128i bytes = count == lanes ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))
                                             : _mm_maskz_loadu_epi8(static_cast<__mmask16>((1 << count) - 1), p);
        return is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
    }
    static Int words_of(int a) { return _mm512_set1_epi16(static_cast<short>(a)); }
    // 32 channels of two pixels, as levels that `zero` (words) is added to; they lie within -32768 and 32767
    static void store_pixels(std::uint8_t* p, std::uint8_t* q, Int p0, Int p1, Int q0, Int q1, Int zero) {
        const Int byte = _mm512_set1_epi16(255);  // signed levels become bytes without saturation
        const Int two = _mm512_and_si512(_mm512_add_epi16(_mm512_packs_epi32(p0, p1), zero), byte);
        const Int other = _mm512_and_si512(_mm512_add_epi16(_mm512_packs_epi32(q0, q1), zero), byte);
        // each quarter of the pack: 4 channels of p0, p1, q0, q1
        const Int order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const Int bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(two, other));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(bytes));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm512_extracti64x4_epi64(bytes, 1));
    }
    static void store_levels(std::uint8_t* p, Int a, int count) {
        const __m128i bytes = _mm512_cvtepi32_epi8(a);
        if (count == lanes)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
        else
            _mm_mask_storeu_epi8(p, static_cast<__mmask16>((1 << count) - 1), bytes);
    }
};

}  // namespace

const bitsmith::Kernel* bitsmith::kernel_avx512_vnni(int tile, int bits, bool columns) {
    return find_kernel<Avx512Vnni>(tile, bits, columns);
}
