// What is refused, and the words for it.
#pragma once

#include "layer.h"

namespace bitsmith {

// Throws std::invalid_argument: wrong sizes, scales that are not finite, an accumulator that could overflow (bound.h).
void check(const Spec& spec);

// The same for a call whose output has these sizes.
void check(const Call& call, std::ptrdiff_t out_height, std::ptrdiff_t out_width);

}  // namespace bitsmith
