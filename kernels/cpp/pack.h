// The layout of Packed (kernel.h), from a checked Spec.
#pragma once

#include "layer.h"

namespace bitsmith {

struct PackedBuffers {
    Buffer &u, &start, &us, &bias, &mul, &outside;
};

// base[k] of the mean tap: what the offset would have added to the accumulator.
std::int64_t base_of(const Spec& spec, std::ptrdiff_t k);

void pack(const Spec& spec, const Kernel& kernel, const PackedBuffers& to);

}  // namespace bitsmith
