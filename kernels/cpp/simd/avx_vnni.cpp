// 256-bit dot products with VEX encoding: CPUs with AVX-VNNI and no AVX-512.
#include "ymm.h"

namespace {

struct AvxVnni : Ymm {
    static constexpr bool dots_bytes = true;
    template <bool Bytes>
    static Sum dot(Sum acc, Int v, Int u) {
        return (Sum)(Bytes ? _mm256_dpbusd_avx_epi32((Int)acc, v, u) : _mm256_dpwssd_avx_epi32((Int)acc, v, u));
    }
};

}  // namespace

const bitsmith::Kernel* bitsmith::kernel_avx_vnni(int tile, int bits, bool columns) {
    return find_kernel<AvxVnni>(tile, bits, columns);
}
