// The layout of Packed (kernel.h), from a checked Spec.
#pragma once

#include "layer.h"

namespace bitsmith {

struct PackedBuffers {
    Buffer &u, &start, &us, &bias, &mul, &outside;
};

// The one tap (row 1, column 1) at which B^T keeps the mean of a tile: the other rows of B^T sum to 0.
constexpr int mean_tap(int tile) { return tile + 3; }

// base[k] of that tap: what the offset would have added to the accumulator.
std::int64_t base_of(const Spec& spec, std::ptrdiff_t k);

void pack(const Spec& spec, const Kernel& kernel, const PackedBuffers& to);

}  // namespace bitsmith
