// What the dot product alone can do.
#pragma once

#include "isa.h"

namespace bitsmith {

// Multiply-adds a second of one thread, with everything in registers (0 for the reference).
double peak_of(Isa isa, int bits);

}  // namespace bitsmith
