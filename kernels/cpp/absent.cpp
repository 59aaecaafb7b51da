// For builds where a set of instructions cannot be compiled: another architecture, or an old compiler.
#include "kernel.h"

namespace bitsmith {

#if !defined(BITSMITH_AVX512_VNNI)
const Kernel* kernel_avx512_vnni(int, int, bool) { return nullptr; }
#endif
#if !defined(BITSMITH_AVX_VNNI)
const Kernel* kernel_avx_vnni(int, int, bool) { return nullptr; }
#endif
#if !defined(BITSMITH_AVX2)
const Kernel* kernel_avx2(int, int, bool) { return nullptr; }
#endif

}  // namespace bitsmith
