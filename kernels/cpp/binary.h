// Products of values of one bit: exclusive or, and counted ones.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bitsmith {

// A word holds 64 values of a row, bit k being 1 where value k is +1. Bits beyond the row are 0 in both factors.
constexpr std::ptrdiff_t binary_lanes = 8;  // columns that stand together: b is [block][word][lane]

enum class BinaryIsa { avx512_vpopcntdq, avx2, reference };

const char* name_of(BinaryIsa isa);

// True where both this CPU (and its operating system) and this build have it.
bool available(BinaryIsa isa);

// y[i][j] = sum over the row of a_i * b_j = length - 2 * ones(a_i ^ b_j), exact in int32.
struct BinaryProduct {
    const std::uint64_t* a;  // [rows][words]
    const std::uint64_t* b;  // [blocks][words][lanes], columns that do not exist being 0
    std::int32_t* y;         // [rows][columns]
    std::ptrdiff_t rows, columns, words;
    std::int32_t length;
};

using BinaryKernel = void (*)(const BinaryProduct&);

// The rows of a product by one instruction set that is available.
void multiply(const BinaryProduct& product, BinaryIsa isa);

// Null where the library was built without it.
BinaryKernel binary_avx512_vpopcntdq();
BinaryKernel binary_avx2();
BinaryKernel binary_reference();

}  // namespace bitsmith
