#include "adder_c_abi.h"

#include <algorithm>
#include <string>

#include "adder.h"
#include "pool.h"

namespace {

constexpr bitsmith::AdderIsa all[] = {bitsmith::AdderIsa::avx512, bitsmith::AdderIsa::avx2,
                                      bitsmith::AdderIsa::reference};

}  // namespace

const char* bitsmith_adder_isas(void) {
    static const std::string names = [] {
        std::string joined;
        for (const bitsmith::AdderIsa isa : all)
            if (available(isa)) joined += (joined.empty() ? "" : ",") + std::string(name_of(isa));
        return joined;
    }();
    return names.c_str();
}

int32_t bitsmith_adder_run(const bitsmith_adder* from) {
    try {
        const bitsmith::AdderShape shape = {
            from->images,
            from->channels,
            from->height,
            from->width,
            from->filters,
            from->groups,
            {from->kernel[0], from->kernel[1]},
            {from->stride[0], from->stride[1]},
            {from->dilation[0], from->dilation[1]},
            from->top,
            from->left,
            {from->out[0], from->out[1]},
        };
        for (const bitsmith::AdderIsa isa : all) {
            if (!available(isa) || (from->isa && std::string(from->isa) != name_of(isa))) continue;
            const bitsmith::AdderKernel& kernel = *bitsmith::adder_kernel(isa);
            // images, which share no pixel of the gradient; or tiles of outputs
            const int64_t parts = from->g ? from->images
                                          : (from->images * shape.places() + bitsmith::adder_rows - 1) /
                                                bitsmith::adder_rows;
            const int threads = static_cast<int>(std::min<int64_t>(from->threads, std::max<int64_t>(parts, 1)));
            bitsmith::pool_for(threads, [&](int part) {
                const int64_t begin = parts * part / threads, end = parts * (part + 1) / threads;
                if (from->g)
                    adder_input_gradient(shape, from->x, from->w, from->g, from->y, begin, end, kernel);
                else
                    adder_forward(shape, from->x, from->w, from->y, begin * bitsmith::adder_rows,
                                  std::min<int64_t>(end * bitsmith::adder_rows, from->images * shape.places()), kernel);
            });
            return 0;
        }
        return 1;
    } catch (...) {
        return 2;
    }
}
