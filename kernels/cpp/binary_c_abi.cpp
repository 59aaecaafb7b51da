#include "binary_c_abi.h"

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <string>

#include "binary_layer.h"
#include "error.h"
#include "pool.h"

struct bitsmith_binary_conv {
    bitsmith::BinaryConv layer;
};

namespace {

constexpr bitsmith::BinaryIsa all[] = {
    bitsmith::BinaryIsa::avx512_vpopcntdq, bitsmith::BinaryIsa::avx2, bitsmith::BinaryIsa::reference};

bitsmith::BinaryIsa isa_of(const char* name) {
    for (const bitsmith::BinaryIsa isa : all)
        if (available(isa) && (!name || std::string(name) == name_of(isa))) return isa;
    throw std::invalid_argument(std::string("isa is '") + name + "'; this CPU and build have " + bitsmith_binary_isas());
}

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
    return bitsmith::guarded([&] {
        const bitsmith::BinaryKernels& kernels = binary_kernels(isa_of(from->isa));
        const int threads = static_cast<int>(std::min<int64_t>(from->threads, std::max<int64_t>(from->rows, 1)));
        bitsmith::pool_for(threads, [&](int part) {
            const std::ptrdiff_t begin = from->rows * part / threads, end = from->rows * (part + 1) / threads;
            kernels.multiply({from->a + begin * from->words, from->b, from->y + begin * from->columns, end - begin,
                              from->columns, from->words, from->length, from->columns});
        });
    });
}

bitsmith_binary_conv* bitsmith_binary_conv_new(const bitsmith_binary_spec* from) {
    bitsmith_binary_conv* made = nullptr;
    bitsmith::guarded([&] {
        bitsmith::BinarySpec spec;
        spec.channels_in = from->channels_in;
        spec.channels_out = from->channels_out;
        for (int axis = 0; axis < 2; ++axis) {
            spec.kernel[axis] = from->kernel[axis];
            spec.strides[axis] = from->strides[axis];
            spec.dilations[axis] = from->dilations[axis];
        }
        std::copy(from->pads, from->pads + 4, spec.pads);
        spec.bits = from->bits;
        spec.scale = from->scale;
        spec.shift = from->shift;
        spec.isa = isa_of(from->isa);
        made = new bitsmith_binary_conv{bitsmith::BinaryConv(spec)};
    });
    return made;
}

void bitsmith_binary_conv_free(bitsmith_binary_conv* layer) { delete layer; }

const char* bitsmith_binary_conv_isa(const bitsmith_binary_conv* layer) { return name_of(layer->layer.isa()); }

int32_t bitsmith_binary_conv_run(const bitsmith_binary_conv* layer, const float* x, int64_t batch, int64_t height,
                                 int64_t width, float* y, int32_t threads) {
    return bitsmith::guarded([&] { layer->layer.run(x, batch, height, width, y, threads, bitsmith::pool_for); });
}
