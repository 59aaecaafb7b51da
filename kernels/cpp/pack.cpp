#include "pack.h"

#include <algorithm>
#include <cstring>

#include "bound.h"

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
            std::int64_t sum = 0;
            for (std::ptrdiff_t c = 0; c < spec.channels_in; ++c) {
                row[c / per_group * kernel.together * wide * lanes * per_group + c % per_group] = from[c];
                sum += from[c];
            }
            const std::ptrdiff_t at = (block * 2 * taps + (outer + inner) * wide + column) * lanes + lane;
            const std::int64_t base = p == mean_tap(spec.tile) ? base_of(spec, k) : 0;
            // may wrap around as the sum does: the last value is what fits
            start[at] = static_cast<std::int32_t>(static_cast<std::uint32_t>(base - (kernel.bytes ? 128 * sum : 0)));
            us[at] = spec.us[p * spec.channels_out + k];
        }
    }
}

void pack_multipliers(const Spec& spec, const Kernel& kernel, const PackedBuffers& to) {
    const std::ptrdiff_t taps = (spec.tile + 2) * (spec.tile + 2), chunk = kernel.chunk;
    const std::ptrdiff_t padded = (spec.channels_in + chunk - 1) / chunk * chunk;
    std::int16_t* mul =
        static_cast<std::int16_t*>(to.mul.reserve(static_cast<std::size_t>((taps + 1) * padded) * sizeof(std::int16_t)));
    const int zero = spec.x_zero * mean_gain(spec.tile);
    for (std::ptrdiff_t c = 0; c < spec.channels_in; ++c) {
        std::int16_t* const first = mul + c / chunk * (taps + 1) * chunk + c % chunk;
        for (std::ptrdiff_t p = 0; p < taps; ++p) first[p * chunk] = spec.mul[p * spec.channels_in + c];
        first[taps * chunk] = static_cast<std::int16_t>(zero + (spec.offset ? spec.offset[c] : 0));
    }
}

// The scalar kernel reads what it was given.
void keep_weights(const Spec& spec, const PackedBuffers& to) {
    const std::size_t taps = static_cast<std::size_t>((spec.tile + 2) * (spec.tile + 2));
    const std::size_t rows = taps * static_cast<std::size_t>(spec.channels_out);
    const std::size_t bytes = rows * static_cast<std::size_t>(spec.channels_in * spec.bits / 8);
    std::memcpy(to.u.reserve(bytes), spec.u, bytes);
    std::memcpy(to.us.reserve(rows * sizeof(float)), spec.us, rows * sizeof(float));
    std::int32_t* start = static_cast<std::int32_t*>(to.start.reserve(rows * sizeof(std::int32_t)));
    for (std::ptrdiff_t k = 0; k < spec.channels_out; ++k)
        start[mean_tap(spec.tile) * spec.channels_out + k] = static_cast<std::int32_t>(base_of(spec, k));
}

}  // namespace

std::int64_t base_of(const Spec& spec, std::ptrdiff_t k) {
    if (!spec.offset) return 0;
    const std::ptrdiff_t channels = spec.channels_in, tap = mean_tap(spec.tile);
    const std::ptrdiff_t row = (tap * spec.channels_out + k) * channels;
    std::int64_t sum = 0;
    for (std::ptrdiff_t c = 0; c < channels; ++c) {
        const std::int64_t u = spec.bits == 8 ? static_cast<const std::int8_t*>(spec.u)[row + c]
                                              : static_cast<const std::int16_t*>(spec.u)[row + c];
        sum += u * spec.offset[c] * spec.mul[tap * channels + c];
    }
    return (sum + (1 << 14)) >> 15;
}

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
    pack_multipliers(spec, kernel, to);
    const std::size_t pixel = static_cast<std::size_t>(spec.channels_in);
    std::memset(to.outside.reserve(pixel), spec.x_zero, pixel);
}

}  // namespace bitsmith
