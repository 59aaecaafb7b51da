// AVX2 alone. Bytes are kept as 16 bits: vpmaddubsw would saturate, vpmaddwd is exact.
#include "ymm.h"

namespace {

struct Avx2 : Ymm {
    static constexpr bool dots_bytes = false;
    // a sum of two products is within the bound of the whole sum (bound.h), so it fits
    template <bool Bytes>
    static Sum dot(Sum acc, Int v, Int u) {
        static_assert(!Bytes);
        return (Sum)_mm256_add_epi32((Int)acc, _mm256_madd_epi16(v, u));
    }
};

}  // namespace

const bitsmith::Kernel* bitsmith::kernel_avx2(int tile, int bits, bool columns) {
    return find_kernel<Avx2>(tile, bits, columns);
}
