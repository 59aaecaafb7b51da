// The instruction sets of the kernels, best first.
#pragma once

#include <vector>

namespace bitsmith {

enum class Isa { avx512_vnni, avx_vnni, avx2, reference };

const char* name_of(Isa isa);

// True where both this CPU (and its operating system) and this build have it.
bool available(Isa isa);

// What is available, best first; the reference is always the last.
std::vector<Isa> available_isas();

}  // namespace bitsmith
