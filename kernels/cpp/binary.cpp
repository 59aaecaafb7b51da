#include "binary.h"

namespace bitsmith {

#ifndef BITSMITH_BINARY_AVX512
BinaryKernel binary_avx512_vpopcntdq() { return nullptr; }
#endif
#ifndef BITSMITH_BINARY_AVX2
BinaryKernel binary_avx2() { return nullptr; }
#endif

namespace {

// the sums of pairs, of fours and of bytes: any CPU, no instruction of its own
std::int32_t ones(std::uint64_t x) {
    x -= x >> 1 & 0x5555555555555555u;
    x = (x & 0x3333333333333333u) + (x >> 2 & 0x3333333333333333u);
    x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
    return static_cast<std::int32_t>(x * 0x0101010101010101u >> 56);
}

void run(const BinaryProduct& p) {
    for (std::ptrdiff_t i = 0; i < p.rows; ++i)
        for (std::ptrdiff_t j = 0; j < p.columns; ++j) {
            const std::uint64_t* a = p.a + i * p.words;
            const std::uint64_t* b = p.b + j / binary_lanes * p.words * binary_lanes + j % binary_lanes;
            std::int32_t count = 0;
            for (std::ptrdiff_t k = 0; k < p.words; ++k) count += ones(a[k] ^ b[k * binary_lanes]);
            p.y[i * p.columns + j] = p.length - 2 * count;
        }
}

}  // namespace

BinaryKernel binary_reference() { return run; }

const char* name_of(BinaryIsa isa) {
    switch (isa) {
        case BinaryIsa::avx512_vpopcntdq: return "avx512_vpopcntdq";
        case BinaryIsa::avx2: return "avx2";
        default: return "reference";
    }
}

bool available(BinaryIsa isa) {
#if defined(__x86_64__)
    switch (isa) {
        case BinaryIsa::avx512_vpopcntdq:
            return binary_avx512_vpopcntdq() && __builtin_cpu_supports("avx512f") &&
                   __builtin_cpu_supports("avx512vpopcntdq");
        case BinaryIsa::avx2: return binary_avx2() && __builtin_cpu_supports("avx2");
        default: return true;
    }
#else
    return isa == BinaryIsa::reference;
#endif
}

void multiply(const BinaryProduct& product, BinaryIsa isa) {
    switch (isa) {
        case BinaryIsa::avx512_vpopcntdq: return binary_avx512_vpopcntdq()(product);
        case BinaryIsa::avx2: return binary_avx2()(product);
        default: return binary_reference()(product);
    }
}

}  // namespace bitsmith
