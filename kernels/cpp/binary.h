// Products of values of one bit: exclusive or, and counted ones.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bitsmith {

// A word holds 64 values of a row, bit k being 1 where value k is +1. Bits beyond the row are 0 in both factors.
constexpr std::ptrdiff_t binary_lanes = 8;  // columns, or pixels, that stand together: b is [block][word][lane]

enum class BinaryIsa { avx512_vpopcntdq, avx2, reference };

const char* name_of(BinaryIsa isa);

// True where both this CPU (and its operating system) and this build have it.
bool available(BinaryIsa isa);

BinaryIsa best_binary_isa();

// y[i][j] = sum over the row of a_i * b_j = length - 2 * ones(a_i ^ b_j), exact in int32.
struct BinaryProduct {
    const std::uint64_t* a;  // [rows][words]
    const std::uint64_t* b;  // [blocks][words][lanes], columns that do not exist being 0
    std::int32_t* y;         // [rows][columns], rows being `pitch` apart
    std::ptrdiff_t rows, columns, words;
    std::int32_t length;
    std::ptrdiff_t pitch;
};

// One row of output maps: y[k][p] = float32(most[k][p] - 2 * ones over the steps) * scale[k] + shift[k].
struct BinaryRow {
    const std::uint64_t* weights;  // [channels][steps]
    const std::uint64_t* x;        // a packed image
    const std::ptrdiff_t* at;      // [steps]: where in x the word of the first pixel is; of the others, behind it
    std::ptrdiff_t steps;
    const std::int32_t* most;      // [channels][width]: the sum where no bit differs
    const float* scale;            // [channels]
    const float* shift;            // [channels]
    float* y;                      // [channels][width], channels being `pitch` apart
    std::ptrdiff_t pitch, channels, width;
};

// Signs of pixels by planes of channels: to[w][p], words being `to_pitch` apart, from x[c][p], planes `pitch` apart.
struct BinaryPlanes {
    const float* x;
    std::ptrdiff_t pitch, channels, width;
    std::uint64_t* to;
    std::ptrdiff_t to_pitch;
};

// A NaN counts as -1 wherever signs are taken.
struct BinaryKernels {
    void (*multiply)(const BinaryProduct&);
    // Reads whole vectors of x: up to 31 words behind the last pixel of a row, whatever they hold.
    void (*convolve)(const BinaryRow&);
    void (*pack_planes)(const BinaryPlanes&);
    // [rows][length] float32, without gaps -> [rows][words].
    void (*pack_rows)(const float* x, std::ptrdiff_t rows, std::ptrdiff_t length, std::uint64_t* to);
    // y[i][j] = float32(the int32 that is there) * scale[j] + shift[j], rows being `pitch` apart.
    void (*finish)(void* y, std::ptrdiff_t rows, std::ptrdiff_t columns, std::ptrdiff_t pitch, const float* scale,
                   const float* shift);
};

constexpr std::ptrdiff_t binary_behind = 31;  // words that must be readable behind a packed image

constexpr std::ptrdiff_t binary_words(std::ptrdiff_t values) { return (values + 63) / 64; }

// Those of an instruction set that is available.
const BinaryKernels& binary_kernels(BinaryIsa isa);

// Null where the library was built without it.
const BinaryKernels* binary_avx512_vpopcntdq();
const BinaryKernels* binary_avx2();

}  // namespace bitsmith
