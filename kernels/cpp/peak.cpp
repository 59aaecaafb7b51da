#include "peak.h"

#include <time.h>

#include <algorithm>

namespace bitsmith {

namespace {

double cpu_seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// the best of ten; a round is 12 independent dot products
template <class Round>
double best_rate(double macs_of_round, Round round) {
    constexpr int rounds = 200000;
    double best = 0;
    for (int repeat = 0; repeat < 10; ++repeat) {
        const double begin = cpu_seconds();
        for (int i = 0; i < rounds; ++i) round();
        best = std::max(best, macs_of_round * rounds / (cpu_seconds() - begin));
    }
    return best;
}

}  // namespace

#if defined(__x86_64__)
// in assembly: the compiler may not know the instruction with the flags of this file, nor drop or reorder it
#define TWELVE(text, r)                                                                                           \
    text r "0\n" text r "1\n" text r "2\n" text r "3\n" text r "4\n" text r "5\n" text r "6\n" text r "7\n" text r \
           "8\n" text r "9\n" text r "10\n" text r "11\n"
#define CLOBBERED                                                                                             \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", \
        "xmm13", "xmm14", "xmm15"

double peak_of(Isa isa, int bits) {
    const double byte = bits == 8 ? 1 : 0.5;
    if (isa == Isa::avx512_vnni && bits == 8)
        return best_rate(12 * 64,
                         [] { __asm__ volatile(TWELVE("vpdpbusd %%zmm14, %%zmm15, ", "%%zmm")::: CLOBBERED); });
    if (isa == Isa::avx512_vnni)
        return best_rate(12 * 32,
                         [] { __asm__ volatile(TWELVE("vpdpwssd %%zmm14, %%zmm15, ", "%%zmm")::: CLOBBERED); });
    if (isa == Isa::avx_vnni)
        return best_rate(12 * 32 * byte,
                         [] { __asm__ volatile(TWELVE("%{vex%} vpdpbusd %%ymm14, %%ymm15, ", "%%ymm")::: CLOBBERED); });
    if (isa == Isa::avx2)  // a product and an addition; 8 bits are kept as 16
        return best_rate(12 * 16, [] {
            __asm__ volatile("vpmaddwd %%ymm14, %%ymm15, %%ymm12\n" TWELVE(
                "vpmaddwd %%ymm14, %%ymm15, %%ymm13\nvpaddd %%ymm12, %%ymm14, ", "%%ymm")::: CLOBBERED);
        });
    return 0;
}
#else
double peak_of(Isa, int) { return 0; }
#endif

}  // namespace bitsmith
