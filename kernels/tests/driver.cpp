// Random layers, of integers, of signs and of distances, on every instruction set against the scalar reference, for the sanitizers and
// valgrind (see README.md).
// Usage: driver [cases]. The exit status is 0 if all agree.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "adder.h"
#include "adder_c_abi.h"
#include "binary_layer.h"
#include "guarded.h"
#include "layer.h"
#include "pool.h"

namespace {

using namespace bitsmith;

struct Random {
    std::mt19937 engine{7};
    int in(int low, int high) { return low + static_cast<int>(engine() % static_cast<unsigned>(high - low + 1)); }
    bool coin() { return engine() & 1; }
    void fill(std::uint8_t* data, std::size_t count) {
        for (std::size_t i = 0; i < count; ++i) data[i] = static_cast<std::uint8_t>(engine());
    }
};

struct Weights {
    std::vector<std::int8_t> u8;
    std::vector<std::int16_t> u16, mul, offset;
    std::vector<float> us, bias;
};

Spec random_spec(Random& random, Weights& w) {
    Spec spec;
    spec.tile = random.coin() ? 2 : 4;
    spec.bits = random.coin() ? 8 : 16;
    spec.channels_in = random.in(0, 3) ? random.in(1, 80) : random.in(193, 260);  // of many, products go tap by tap
    spec.channels_out = random.in(1, 80);
    spec.x_signed = random.coin();
    spec.x_zero = random.in(0, 255) - (spec.x_signed ? 128 : 0);
    int* const pads[] = {&spec.pad_top, &spec.pad_left, &spec.pad_bottom, &spec.pad_right};
    for (int* pad : pads) *pad = random.in(0, 2);
    const int taps = (spec.tile + 2) * (spec.tile + 2);
    const std::size_t rows = static_cast<std::size_t>(taps * spec.channels_out);
    const std::size_t size = rows * static_cast<std::size_t>(spec.channels_in);
    w.u8.resize(size);
    w.u16.resize(size);
    for (auto& u : w.u8) u = static_cast<std::int8_t>(random.in(-127, 127));
    for (auto& u : w.u16) u = static_cast<std::int16_t>(random.in(-1000, 1000));
    w.mul.resize(static_cast<std::size_t>(taps * spec.channels_in));
    for (auto& m : w.mul) m = static_cast<std::int16_t>(random.in(1, 32767));
    // D at tap (1, 1) lies between -zero and 255 - zero times at least 4
    w.offset.resize(static_cast<std::size_t>(spec.channels_in));
    const int zero = spec.x_zero + (spec.x_signed ? 128 : 0);
    for (auto& o : w.offset) o = static_cast<std::int16_t>(4 * random.in(-zero, 255 - zero));
    w.us.resize(rows);
    for (auto& s : w.us) s = static_cast<float>(random.in(1, 1000)) * (spec.bits == 8 ? 1e-6f : 1e-8f);
    w.bias.resize(static_cast<std::size_t>(spec.channels_out));
    for (auto& b : w.bias) b = static_cast<float>(random.in(-100, 100)) * 0.3f;
    spec.u = spec.bits == 8 ? static_cast<const void*>(w.u8.data()) : w.u16.data();
    spec.mul = w.mul.data();
    spec.offset = random.coin() ? w.offset.data() : nullptr;
    spec.us = w.us.data();
    spec.bias = random.coin() ? w.bias.data() : nullptr;
    return spec;
}

Levels random_levels(Random& random) {
    const bool is_signed = random.coin();
    return {static_cast<float>(random.in(1, 100)) * 0.03f, random.in(0, 255) - (is_signed ? 128 : 0), is_signed};
}

bool one_case(Random& random, int number) {
    Weights weights;
    Spec spec = random_spec(random, weights);
    Call call;
    call.batch = random.in(1, 3);
    call.height = random.in(std::max(1, 3 - spec.pad_top - spec.pad_bottom), 18);
    call.width = random.in(std::max(1, 3 - spec.pad_left - spec.pad_right), 18);
    call.y_levels = random_levels(random);
    call.residual_levels = random_levels(random);
    call.low = call.y_levels.is_signed ? -128 : 0;
    call.high = call.low + 255;
    call.relu = random.coin();
    const bool after = random.coin();
    std::unique_ptr<Guarded> x, residual, expected;
    for (const Isa isa : {Isa::reference, Isa::avx2, Isa::avx_vnni, Isa::avx512_vnni}) {
        if (!available(isa)) continue;
        spec.isa = isa;
        const Layer layer(spec);
        const std::size_t in = static_cast<std::size_t>(call.batch * call.height * call.width * spec.channels_in);
        const std::size_t out = static_cast<std::size_t>(call.batch * layer.out_height(call.height) *
                                                         layer.out_width(call.width) * spec.channels_out);
        auto y = std::make_unique<Guarded>(out, after);
        if (isa == Isa::reference) {
            x = std::make_unique<Guarded>(in, after);
            residual = std::make_unique<Guarded>(out, after);
            random.fill(x->data(), in);
            random.fill(residual->data(), out);
            call.x = x->data();
            call.residual = random.coin() ? residual->data() : nullptr;
        }
        call.y = y->data();
        for (call.parts = 1; call.parts <= 3; ++call.parts) {
            std::memset(y->data(), 0x55, out);
            layer.run(call, pool_for);
            if (!expected) {
                expected = std::move(y);
                y = std::make_unique<Guarded>(out, after);
                call.y = y->data();
            } else if (std::memcmp(y->data(), expected->data(), out)) {
                std::printf("case %d: %s differs from the reference: tile %d, bits %d, %td -> %td channels, "
                            "map %td x %td, %d threads\n",
                            number, name_of(isa), spec.tile, spec.bits, spec.channels_in, spec.channels_out,
                            call.height, call.width, call.parts);
                return false;
            }
        }
    }
    return true;
}

struct Signs {
    std::vector<std::uint8_t> bits;
    std::vector<float> scale, shift;
};

BinarySpec random_signs(Random& random, Signs& w, bool linear) {
    BinarySpec spec;
    spec.channels_in = random.in(0, 3) ? random.in(1, 140) : random.in(2000, 2100);  // of many, bytes of ones fill up
    spec.channels_out = random.in(1, 40);
    for (int axis = 0; axis < 2 && !linear; ++axis) {
        spec.kernel[axis] = random.in(1, spec.channels_in > 1000 ? 2 : 4);
        spec.strides[axis] = random.in(1, 3);
        spec.dilations[axis] = random.in(1, 2);
    }
    for (std::ptrdiff_t& pad : spec.pads) pad = linear ? 0 : random.in(0, 3);
    const std::ptrdiff_t taps = spec.kernel[0] * spec.kernel[1];
    w.bits.resize(static_cast<std::size_t>(spec.channels_out * taps * ((spec.channels_in + 7) / 8)));
    random.fill(w.bits.data(), w.bits.size());
    w.scale.resize(static_cast<std::size_t>(spec.channels_out));
    w.shift.resize(w.scale.size());
    for (auto& s : w.scale) s = static_cast<float>(random.in(-1000, 1000)) * 1e-3f;
    for (auto& s : w.shift) s = static_cast<float>(random.in(-100, 100)) * 0.3f;
    spec.bits = w.bits.data();
    spec.scale = w.scale.data();
    spec.shift = w.shift.data();
    return spec;
}

void fill_floats(Random& random, std::uint8_t* data, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
        const float value = static_cast<float>(random.in(-3, 3)) * (random.coin() ? 1.0f : 0.0f);  // zeros of both signs
        std::memcpy(data + i * 4, &value, 4);
    }
}

// `run`: of a layer, from x to y, in so many parts.
template <class Make, class Run>
bool agrees(Random& random, int number, std::size_t in, std::size_t out, BinarySpec spec, Make make, Run run) {
    const bool after = random.coin();
    Guarded x(in * 4, after);
    fill_floats(random, x.data(), in);
    std::unique_ptr<Guarded> expected;
    for (const BinaryIsa isa : {BinaryIsa::reference, BinaryIsa::avx2, BinaryIsa::avx512_vpopcntdq}) {
        if (!available(isa)) continue;
        spec.isa = isa;
        const auto layer = make(spec);
        for (int parts = 1; parts <= 3; ++parts) {
            auto y = std::make_unique<Guarded>(out * 4, after);
            std::memset(y->data(), 0x55, out * 4);
            run(*layer, reinterpret_cast<const float*>(x.data()), reinterpret_cast<float*>(y->data()), parts);
            if (!expected) {
                expected = std::move(y);
            } else if (std::memcmp(y->data(), expected->data(), out * 4)) {
                std::printf("case %d: %s differs from the reference: signs, %td -> %td channels, kernel %td x %td, strides "
                            "%td, %td, %d threads\n",
                            number, name_of(isa), spec.channels_in, spec.channels_out, spec.kernel[0], spec.kernel[1],
                            spec.strides[0], spec.strides[1], parts);
                return false;
            }
        }
    }
    return true;
}

bool one_case_of_signs(Random& random, int number) {
    Signs weights;
    const bool linear = !random.in(0, 2);
    const BinarySpec spec = random_signs(random, weights, linear);
    const auto channels = [&](std::ptrdiff_t each, std::ptrdiff_t many) { return static_cast<std::size_t>(each * many); };
    if (linear) {
        const std::ptrdiff_t rows = random.in(1, 40);
        return agrees(
            random, number, channels(rows, spec.channels_in), channels(rows, spec.channels_out), spec,
            [](const BinarySpec& s) { return std::make_unique<BinaryDense>(s); },
            [&](const BinaryDense& layer, const float* x, float* y, int parts) { layer.run(x, rows, y, parts, pool_for); });
    }
    const std::ptrdiff_t batch = random.in(1, 2);
    std::ptrdiff_t size[2];
    for (int axis = 0; axis < 2; ++axis) {
        const std::ptrdiff_t covered = (spec.kernel[axis] - 1) * spec.dilations[axis] + 1;
        const std::ptrdiff_t least = std::max<std::ptrdiff_t>(1, covered - spec.pads[axis] - spec.pads[axis + 2]);
        size[axis] = least + random.in(0, axis ? 40 : 9);
    }
    const BinaryConv shape(spec);
    const std::ptrdiff_t area = shape.out_height(size[0]) * shape.out_width(size[1]);
    return agrees(
        random, number, channels(batch * size[0] * size[1], spec.channels_in), channels(batch * area, spec.channels_out),
        spec, [](const BinarySpec& s) { return std::make_unique<BinaryConv>(s); },
        [&](const BinaryConv& layer, const float* x, float* y, int parts) {
            layer.run(x, batch, size[0], size[1], y, parts, pool_for);
        });
}

// Numbers of any size, or those of a grid of 8 bits.
void fill_levels(Random& random, std::uint8_t* data, std::size_t count, bool integers) {
    for (std::size_t i = 0; i < count; ++i) {
        const float value = integers ? static_cast<float>(random.in(-127, 127)) * 0.03f
                                     : static_cast<float>(random.in(-1000000, 1000000)) * 3e-6f;
        std::memcpy(data + i * 4, &value, 4);
    }
}

// Distances and their gradient by the input: a convolution, or a linear layer, of maps of one pixel.
bool one_case_of_distances(Random& random, int number) {
    const bool linear = !random.in(0, 2), integers = random.coin(), gradient = random.coin(), after = random.coin();
    bitsmith_adder layer = {};
    layer.groups = linear ? 1 : random.in(1, 3);
    const int each = linear ? random.in(1, 300) : random.in(1, 9), made = random.in(1, 20);
    layer.channels = layer.groups * each;
    layer.filters = layer.groups * made;
    layer.images = linear ? random.in(1, 100) : random.in(1, 3);
    std::int64_t size[2] = {1, 1}, *const first[2] = {&layer.top, &layer.left};
    for (int axis = 0; axis < 2; ++axis) {
        layer.kernel[axis] = linear ? 1 : random.in(1, 4);
        layer.stride[axis] = linear ? 1 : random.in(1, 3);
        layer.dilation[axis] = linear ? 1 : random.in(1, 2);
        const int before = linear ? 0 : random.in(0, 3), behind = linear ? 0 : random.in(0, 3);
        const std::int64_t covered = (layer.kernel[axis] - 1) * layer.dilation[axis] + 1;
        if (!linear) size[axis] = std::max<std::int64_t>(1, covered - before - behind) + random.in(0, axis ? 40 : 9);
        *first[axis] = before;
        layer.out[axis] = (size[axis] + before + behind - covered) / layer.stride[axis] + 1;
    }
    layer.height = size[0];
    layer.width = size[1];
    const auto count = [](std::int64_t a, std::int64_t b, std::int64_t c) { return static_cast<std::size_t>(a * b * c); };
    const std::size_t in = count(layer.images, layer.channels, layer.height * layer.width);
    const std::size_t out = count(layer.images, layer.filters, layer.out[0] * layer.out[1]);
    const std::size_t weights = count(layer.filters, each, layer.kernel[0] * layer.kernel[1]);
    Guarded x(in * 4, after), w(weights * 4, after), g(out * 4, after);
    fill_levels(random, x.data(), in, integers);
    fill_levels(random, w.data(), weights, integers);
    fill_levels(random, g.data(), out, false);
    layer.x = reinterpret_cast<const float*>(x.data());
    layer.w = reinterpret_cast<const float*>(w.data());
    layer.g = gradient ? reinterpret_cast<const float*>(g.data()) : nullptr;
    const std::size_t bytes = 4 * (gradient ? in : out);
    std::unique_ptr<Guarded> expected;
    for (const AdderIsa isa : {AdderIsa::reference, AdderIsa::avx2, AdderIsa::avx512}) {
        if (!available(isa)) continue;
        layer.isa = name_of(isa);
        for (layer.threads = 1; layer.threads <= 4; ++layer.threads) {
            auto y = std::make_unique<Guarded>(bytes, after);
            std::memset(y->data(), 0x55, bytes);
            layer.y = reinterpret_cast<float*>(y->data());
            const std::int32_t status = bitsmith_adder_run(&layer);
            if (!status && !expected) {
                expected = std::move(y);
            } else if (status || std::memcmp(y->data(), expected->data(), bytes)) {
                std::printf("case %d: %s differs from the reference (status %d): %s, %td -> %td channels in %td groups, "
                            "kernel %td x %td, strides %td, %td, map %td x %td, %d threads\n",
                            number, layer.isa, status, gradient ? "gradient" : "distances", layer.channels, layer.filters,
                            layer.groups, layer.kernel[0], layer.kernel[1], layer.stride[0], layer.stride[1], layer.height,
                            layer.width, layer.threads);
                return false;
            }
        }
    }
    return true;
}

}  // namespace

int main(int count, char** words) {
    const int cases = count > 1 ? std::atoi(words[1]) : 500;
    Random random;
    int bad = 0;
    for (int i = 0; i < cases; ++i) bad += !one_case(random, i);
    std::printf("%d cases, %d differ; instruction sets:", cases, bad);
    for (const Isa isa : available_isas()) std::printf(" %s", name_of(isa));
    int wrong = 0;
    for (int i = 0; i < cases; ++i) wrong += !one_case_of_signs(random, i);
    std::printf("\n%d cases of signs, %d differ; instruction sets:", cases, wrong);
    for (const BinaryIsa isa : {BinaryIsa::avx512_vpopcntdq, BinaryIsa::avx2, BinaryIsa::reference})
        if (available(isa)) std::printf(" %s", name_of(isa));
    int far = 0;
    for (int i = 0; i < cases; ++i) far += !one_case_of_distances(random, i);
    std::printf("\n%d cases of distances, %d differ; instruction sets: %s\n", cases, far, bitsmith_adder_isas());
    return bad + wrong + far != 0;
}
