#include "pack.h"

#include <algorithm>
#include <cstring>

namespace bitsmith {

namespace {

// From: [tap][channel out][channel in] of T. To: [block][tap][group][column][lane][4 bytes] of V, or where the kernel takes
// the taps of a column together: [block][column of taps][group][tap][column][lane][4 bytes].
template <class T, class V>
void pack_weights(const Spec& spec, const Kernel& kernel, const PackedBuffers& to) {
    const T* u = static_cast<const T*>(spec.u);
    const std::ptrdiff_t taps = (spec.tile + 2) * (spec.tile + 2), lanes = kernel.lanes;
    constexpr std::ptrdiff_t per_group = 4 / sizeof(V);
    const std::ptrdiff_t groups = (spec.channels_in + per_group - 1) / per_group;
    const std::ptrdiff_t columns = (spec.channels_out + lanes - 1) / lanes;
    V* packed = static_cast<V*>(to.u.reserve(static_cast<std::size_t>(taps * groups * columns * lanes) * 4));
    std::int32_t* start =
        static_cast<std::int32_t*>(to.start.reserve(static_cast<std::size_t>(taps * columns * lanes) * 4));
    float* us = static_cast<float*>(to.us.reserve(static_cast<std::size_t>(taps * columns * lanes) * 4));
    for (std::ptrdiff_t k = 0; k < spec.channels_out; ++k) {
        const std::ptrdiff_t block = k / (2 * lanes), column = k % (2 * lanes) / lanes, lane = k % lanes;
        const std::ptrdiff_t wide = std::min<std::ptrdiff_t>(2, columns - 2 * block);  // columns of this block
        for (std::ptrdiff_t p = 0; p < taps; ++p) {
            const T* from = u + (p * spec.channels_out + k) * spec.channels_in;
            const std::ptrdiff_t inner = kernel.together > 1 ? p / kernel.together : 0;
            const std::ptrdiff_t outer = kernel.together > 1 ? p % kernel.together * kernel.together : p;
            V* row = packed + ((block * 2 * taps + outer * wide) * groups + inner * wide + column) * lanes * per_group +
                     lane * per_group;
            std::int32_t sum = 0;
            for (std::ptrdiff_t c = 0; c < spec.channels_in; ++c) {
                row[c / per_group * kernel.together * wide * lanes * per_group + c % per_group] = from[c];
                sum += from[c];
            }
            const std::ptrdiff_t at = (block * 2 * taps + (outer + inner) * wide + column) * lanes + lane;
            start[at] = kernel.bytes ? -128 * sum : 0;  // fits: |sum| * 128 is within the bound
            us[at] = spec.us[p * spec.channels_out + k];
        }
    }
}

// The scalar kernel reads what it was given.
void keep_weights(const Spec& spec, const PackedBuffers& to) {
    const std::size_t taps = static_cast<std::size_t>((spec.tile + 2) * (spec.tile + 2));
    const std::size_t rows = taps * static_cast<std::size_t>(spec.channels_out);
    const std::size_t bytes = rows * static_cast<std::size_t>(spec.channels_in * spec.bits / 8);
    std::memcpy(to.u.reserve(bytes), spec.u, bytes);
    std::memcpy(to.us.reserve(rows * sizeof(float)), spec.us, rows * sizeof(float));
}

}  // namespace

void pack(const Spec& spec, const Kernel& kernel, const PackedBuffers& to) {
    if (kernel.lanes == 1)
        keep_weights(spec, to);
    else if (spec.bits == 16)
        pack_weights<std::int16_t, std::int16_t>(spec, kernel, to);
    else if (kernel.bytes)
        pack_weights<std::int8_t, std::int8_t>(spec, kernel, to);
    else
        pack_weights<std::int8_t, std::int16_t>(spec, kernel, to);
    const std::ptrdiff_t lanes = kernel.lanes;
    const std::ptrdiff_t padded = (spec.channels_out + lanes - 1) / lanes * lanes;
    float* bias = static_cast<float*>(to.bias.reserve(static_cast<std::size_t>(padded) * sizeof(float)));
    if (spec.bias) std::copy_n(spec.bias, spec.channels_out, bias);
    const std::size_t pixel = static_cast<std::size_t>(spec.channels_in);
    std::memset(to.outside.reserve(pixel), spec.x_zero, pixel);
}

}  // namespace bitsmith
