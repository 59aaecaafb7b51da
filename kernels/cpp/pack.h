// The layout of Packed (kernel.h), from a checked Spec.
#pragma once

#include "layer.h"

namespace bitsmith {

struct PackedBuffers {
    Buffer &u, &start, &us, &bias, &outside;
};

void pack(const Spec& spec, const Kernel& kernel, const PackedBuffers& to);

}  // namespace bitsmith
