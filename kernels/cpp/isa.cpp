#include "isa.h"

#include "kernel.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace bitsmith {

namespace {

struct Cpu {
    bool avx2 = false, avx_vnni = false, avx512_vnni = false;
};

#if defined(__x86_64__)
// what the operating system saves on a context switch
unsigned saved_state() {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

Cpu detect() {
    Cpu cpu;
    unsigned a, b, c, d;
    constexpr unsigned os_saves = 1u << 27;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & os_saves)) return cpu;
    const unsigned saved = saved_state();
    constexpr unsigned ymm = 0x06, zmm = 0xe6;
    if ((saved & ymm) != ymm || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return cpu;
    const unsigned leaves = a;
    cpu.avx2 = b >> 5 & 1;
    constexpr unsigned f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    cpu.avx512_vnni = (saved & zmm) == zmm && (b & f_dq_bw_vl) == f_dq_bw_vl && (c >> 11 & 1);
    if (leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) cpu.avx_vnni = cpu.avx2 && (a >> 4 & 1);
    return cpu;
}
#else
Cpu detect() { return {}; }
#endif

}  // namespace

const char* name_of(Isa isa) {
    switch (isa) {
        case Isa::avx512_vnni: return "avx512_vnni";
        case Isa::avx_vnni: return "avx_vnni";
        case Isa::avx2: return "avx2";
        default: return "reference";
    }
}

bool available(Isa isa) {
    static const Cpu cpu = detect();
    switch (isa) {
        case Isa::avx512_vnni: return cpu.avx512_vnni && kernel_avx512_vnni(2, 8, false);
        case Isa::avx_vnni: return cpu.avx_vnni && kernel_avx_vnni(2, 8, false);
        case Isa::avx2: return cpu.avx2 && kernel_avx2(2, 8, false);
        default: return true;
    }
}

std::vector<Isa> available_isas() {
    std::vector<Isa> found;
    for (const Isa isa : {Isa::avx512_vnni, Isa::avx_vnni, Isa::avx2, Isa::reference})
        if (available(isa)) found.push_back(isa);
    return found;
}

}  // namespace bitsmith
