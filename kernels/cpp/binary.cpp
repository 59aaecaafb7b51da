#include "binary.h"

#include <initializer_list>

#include "simd/binary_finish.h"

namespace bitsmith {

#ifndef BITSMITH_BINARY_AVX512
const BinaryKernels* binary_avx512_vpopcntdq() { return nullptr; }
#endif
#ifndef BITSMITH_BINARY_AVX2
const BinaryKernels* binary_avx2() { return nullptr; }
#endif

namespace {

// the sums of pairs, of fours and of bytes: any CPU, no instruction of its own
std::int32_t ones(std::uint64_t x) {
    x -= x >> 1 & 0x5555555555555555u;
    x = (x & 0x3333333333333333u) + (x >> 2 & 0x3333333333333333u);
    x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
    return static_cast<std::int32_t>(x * 0x0101010101010101u >> 56);
}

void multiply(const BinaryProduct& p) {
    for (std::ptrdiff_t i = 0; i < p.rows; ++i)
        for (std::ptrdiff_t j = 0; j < p.columns; ++j) {
            const std::uint64_t* a = p.a + i * p.words;
            const std::uint64_t* b = p.b + j / binary_lanes * p.words * binary_lanes + j % binary_lanes;
            std::int32_t count = 0;
            for (std::ptrdiff_t k = 0; k < p.words; ++k) count += ones(a[k] ^ b[k * binary_lanes]);
            p.y[i * p.pitch + j] = p.length - 2 * count;
        }
}

void convolve(const BinaryRow& r) {
    for (std::ptrdiff_t k = 0; k < r.channels; ++k)
        for (std::ptrdiff_t p = 0; p < r.width; ++p) {
            std::int32_t count = 0;
            for (std::ptrdiff_t s = 0; s < r.steps; ++s) count += ones(r.weights[k * r.steps + s] ^ r.x[r.at[s] + p]);
            r.y[k * r.pitch + p] = static_cast<float>(r.most[k * r.width + p] - 2 * count) * r.scale[k] + r.shift[k];
        }
}

void pack_planes(const BinaryPlanes& b) {
    for (std::ptrdiff_t first = 0, w = 0; first < b.channels; first += 64, ++w)
        for (std::ptrdiff_t p = 0; p < b.width; ++p) {
            std::uint64_t word = 0;
            for (std::ptrdiff_t c = first; c < b.channels && c < first + 64; ++c)
                word |= static_cast<std::uint64_t>(b.x[c * b.pitch + p] >= 0) << (c - first);
            b.to[w * b.to_pitch + p] = word;
        }
}

void pack_rows(const float* x, std::ptrdiff_t rows, std::ptrdiff_t length, std::uint64_t* to) {
    for (std::ptrdiff_t i = 0; i < rows; ++i, x += length)
        for (std::ptrdiff_t first = 0; first < length; first += 64) {
            std::uint64_t word = 0;
            for (std::ptrdiff_t c = first; c < length && c < first + 64; ++c)
                word |= static_cast<std::uint64_t>(x[c] >= 0) << (c - first);
            *to++ = word;
        }
}

const BinaryKernels reference{multiply, convolve, pack_planes, pack_rows, finish};

}  // namespace

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
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vpopcntdq");
        case BinaryIsa::avx2: return binary_avx2() && __builtin_cpu_supports("avx2");
        default: return true;
    }
#else
    return isa == BinaryIsa::reference;
#endif
}

BinaryIsa best_binary_isa() {
    for (const BinaryIsa isa : {BinaryIsa::avx512_vpopcntdq, BinaryIsa::avx2})
        if (available(isa)) return isa;
    return BinaryIsa::reference;
}

const BinaryKernels& binary_kernels(BinaryIsa isa) {
    switch (isa) {
        case BinaryIsa::avx512_vpopcntdq: return *binary_avx512_vpopcntdq();
        case BinaryIsa::avx2: return *binary_avx2();
        default: return reference;
    }
}

}  // namespace bitsmith
