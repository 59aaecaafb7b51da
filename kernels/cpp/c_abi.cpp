#include "c_abi.h"

#include <exception>
#include <stdexcept>
#include <string>

#include "error.h"
#include "layer.h"
#include "peak.h"
#include "pool.h"

struct bitsmith_layer {
    bitsmith::Layer layer;
};

namespace {

bitsmith::Isa isa_of(const char* name) {
    const std::vector<bitsmith::Isa> isas = bitsmith::available_isas();
    if (!name) return isas.front();
    for (const bitsmith::Isa isa : isas)
        if (std::string(name) == bitsmith::name_of(isa)) return isa;
    throw std::invalid_argument(std::string("isa is '") + name + "'; this CPU and build have " + bitsmith_isas());
}

bitsmith::Levels levels_of(const bitsmith_levels& from) { return {from.scale, from.zero, from.is_signed != 0}; }

}  // namespace

std::string& bitsmith::last_error() {
    static thread_local std::string message;
    return message;
}

int32_t bitsmith_abi(void) { return 3; }

const char* bitsmith_isas(void) {
    static const std::string names = [] {
        std::string joined;
        for (const bitsmith::Isa isa : bitsmith::available_isas())
            joined += (joined.empty() ? "" : ",") + std::string(bitsmith::name_of(isa));
        return joined;
    }();
    return names.c_str();
}

const char* bitsmith_error(void) { return bitsmith::last_error().c_str(); }

bitsmith_layer* bitsmith_layer_new(const bitsmith_spec* from) {
    try {
        bitsmith::Spec spec;
        spec.tile = from->tile;
        spec.bits = from->bits;
        spec.channels_in = from->channels_in;
        spec.channels_out = from->channels_out;
        spec.u = from->u;
        spec.mul = from->mul;
        spec.offset = from->offset;
        spec.us = from->us;
        spec.bias = from->bias;
        spec.x_zero = from->x_zero;
        spec.x_signed = from->x_signed != 0;
        spec.pad_top = from->pads[0];
        spec.pad_left = from->pads[1];
        spec.pad_bottom = from->pads[2];
        spec.pad_right = from->pads[3];
        spec.isa = isa_of(from->isa);
        return new bitsmith_layer{bitsmith::Layer(spec)};
    } catch (const std::exception& error) {
        bitsmith::last_error() = error.what();
        return nullptr;
    }
}

void bitsmith_layer_free(bitsmith_layer* layer) { delete layer; }

int64_t bitsmith_layer_bytes(const bitsmith_layer* layer) {
    return static_cast<int64_t>(layer->layer.packed_bytes());
}

const char* bitsmith_layer_isa(const bitsmith_layer* layer) { return bitsmith::name_of(layer->layer.isa()); }

int32_t bitsmith_layer_run(const bitsmith_layer* layer, const bitsmith_call* from) {
    return bitsmith::guarded([&] {
        bitsmith::Call call;
        call.x = from->x;
        call.batch = from->batch;
        call.height = from->height;
        call.width = from->width;
        call.y = from->y;
        call.y_levels = levels_of(from->y_levels);
        call.low = from->low;
        call.high = from->high;
        call.relu = from->relu != 0;
        call.residual = from->residual;
        call.residual_levels = levels_of(from->residual_levels);
        call.parts = from->threads;
        layer->layer.run(call, bitsmith::pool_for);
    });
}

int64_t bitsmith_layer_multiply(const bitsmith_layer* layer, int32_t rounds) { return layer->layer.multiply(rounds); }

double bitsmith_peak(const char* isa, int32_t bits) {
    try {
        return bitsmith::peak_of(isa_of(isa), bits);
    } catch (const std::exception& error) {
        bitsmith::last_error() = error.what();
        return 0;
    }
}

const char* bitsmith_compiler(void) {
#if defined(__clang__)
    return "clang " __clang_version__;
#else
    return "gcc " __VERSION__;
#endif
}
