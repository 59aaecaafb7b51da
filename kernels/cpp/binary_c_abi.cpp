#include "binary_c_abi.h"

#include <algorithm>
#include <string>

#include "binary.h"
#include "pool.h"

namespace {

constexpr bitsmith::BinaryIsa all[] = {
    bitsmith::BinaryIsa::avx512_vpopcntdq, bitsmith::BinaryIsa::avx2, bitsmith::BinaryIsa::reference};

}  // namespace

const char* bitsmith_binary_isas(void) {
    static const std::string names = [] {
        std::string joined;
        for (const bitsmith::BinaryIsa isa : all)
            if (available(isa)) joined += (joined.empty() ? "" : ",") + std::string(name_of(isa));
        return joined;
    }();
    return names.c_str();
}

int32_t bitsmith_binary_multiply(const bitsmith_binary* from) {
    try {
        for (const bitsmith::BinaryIsa isa : all) {
            if (!available(isa) || (from->isa && std::string(from->isa) != name_of(isa))) continue;
            const int threads = static_cast<int>(std::min<int64_t>(from->threads, std::max<int64_t>(from->rows, 1)));
            bitsmith::pool_for(threads, [&](int part) {
                const std::ptrdiff_t begin = from->rows * part / threads, end = from->rows * (part + 1) / threads;
                multiply({from->a + begin * from->words, from->b, from->y + begin * from->columns, end - begin,
                          from->columns, from->words, from->length},
                         isa);
            });
            return 0;
        }
        return 1;
    } catch (...) {
        return 2;
    }
}
