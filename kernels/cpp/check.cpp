#include "check.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "bound.h"
#include "pack.h"

namespace bitsmith {

namespace {

// So large that no network has it, and so small that no step overflows: |f| < 2^31 * 1e20, the two passes of A^T
// multiply that by at most 19 * 19, and float32 ends at 3.4e38.
constexpr float largest_scale = 1e20f;

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

template <class T>
std::string text(T value) {
    return std::to_string(value);
}

std::string text(float value) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%g", static_cast<double>(value));
    return digits;
}

void need_moderate(const float* values, std::ptrdiff_t count, const char* name) {
    for (std::ptrdiff_t i = 0; i < count; ++i)
        if (!(std::abs(values[i]) <= largest_scale))
            refuse(std::string(name) + " holds " + text(values[i]) + " at " + text(i) +
                   "; must be finite and at most 1e20 in absolute value");
}

void need_levels(const Levels& levels, const char* name) {
    // normal, and its inverse as well
    if (!(levels.scale >= 0x1p-126f && levels.scale <= 0x1p+126f))
        refuse(std::string(name) + " scale is " + text(levels.scale) + "; must be positive and in 2^-126 .. 2^126");
    const int least = levels.is_signed ? -128 : 0;
    if (levels.zero < least || levels.zero > least + 255)
        refuse(std::string(name) + " zero point is " + text(levels.zero) + "; must be in " + text(least) + " .. " +
               text(least + 255));
}

template <class T>
void check_weights(const Spec& spec) {
    const T* u = static_cast<const T*>(spec.u);
    const int taps = (spec.tile + 2) * (spec.tile + 2);
    const int zero = spec.x_zero + (spec.x_signed ? 128 : 0);
    // 8 bits: the limit is the contract's, whatever mul is
    std::vector<std::int64_t> v(static_cast<std::size_t>(spec.channels_in), 128);
    for (int p = 0; p < taps; ++p) {
        const Interval d = interval_of(spec.tile, p, zero);
        const bool mean = p == mean_tap(spec.tile);
        if (spec.bits != 8)
            for (std::ptrdiff_t c = 0; c < spec.channels_in; ++c)
                v[static_cast<std::size_t>(c)] = largest_v(d, spec.bits, spec.mul[p * spec.channels_in + c],
                                                           mean && spec.offset ? spec.offset[c] : 0);
        for (std::ptrdiff_t k = 0; k < spec.channels_out; ++k) {
            const T* row = u + (p * spec.channels_out + k) * spec.channels_in;
            std::int64_t sum = mean ? std::abs(base_of(spec, k)) : 0;
            for (std::ptrdiff_t c = 0; c < spec.channels_in; ++c) {
                if (spec.bits == 8 && row[c] == -128) refuse("u holds -128; must be in -127 .. 127 where bits is 8");
                sum += std::abs(static_cast<std::int64_t>(row[c])) * v[static_cast<std::size_t>(c)];
            }
            if (sum >= std::int64_t{1} << 31)
                refuse("the accumulator could overflow: at tap " + text(p) + " and output channel " + text(k) +
                       " |base| + the sum over input channels of |u| * max|v| is " + text(sum) +
                       "; must be below 2^31 = 2147483648. Use a larger weight scale or a smaller mul for this tap");
        }
    }
}

}  // namespace

void check(const Spec& spec) {
    if (spec.tile != 2 && spec.tile != 4) refuse("tile is " + text(spec.tile) + "; must be 2 or 4");
    if (spec.bits != 8 && spec.bits != 16) refuse("bits is " + text(spec.bits) + "; must be 8 or 16");
    if (spec.channels_in < 1 || spec.channels_out < 1)
        refuse("u has " + text(spec.channels_out) + " output and " + text(spec.channels_in) +
               " input channels; must have at least 1 of each");
    if (!spec.u || !spec.mul || !spec.us) refuse("u, mul and us must be given");
    if (!available(spec.isa))
        refuse(std::string("isa ") + name_of(spec.isa) + " is not available on this CPU or in this build");
    const int taps = (spec.tile + 2) * (spec.tile + 2);
    for (std::ptrdiff_t i = 0; i < taps * spec.channels_in; ++i)
        if (spec.mul[i] < 1) refuse("mul holds " + text(spec.mul[i]) + " at " + text(i) + "; must be in 1 .. 32767");
    need_levels({1, spec.x_zero, spec.x_signed}, "x");
    const Interval reach = interval_of(spec.tile, mean_tap(spec.tile), spec.x_zero + (spec.x_signed ? 128 : 0));
    for (std::ptrdiff_t c = 0; spec.offset && c < spec.channels_in; ++c)
        if (spec.offset[c] < reach.low || spec.offset[c] > reach.high)
            refuse("offset holds " + text(spec.offset[c]) + " at " + text(c) + "; must be in " + text(reach.low) +
                   " .. " + text(reach.high) + ", which tap (1, 1) reaches");
    for (const int pad : {spec.pad_top, spec.pad_left, spec.pad_bottom, spec.pad_right})
        if (pad < 0 || pad > 2) refuse("a pad is " + text(pad) + "; each must be 0, 1 or 2");
    need_moderate(spec.us, taps * spec.channels_out, "us");
    if (spec.bias) need_moderate(spec.bias, spec.channels_out, "bias");
    if (spec.bits == 16) return check_weights<std::int16_t>(spec);
    constexpr std::ptrdiff_t most = ((std::int64_t{1} << 31) - 1) / (128 * 127);
    if (spec.channels_in > most)
        refuse("the accumulator could overflow: " + text(spec.channels_in) +
               " input channels * 128 * 127 must be below 2^31 = 2147483648, that is at most " + text(most) +
               " channels");
    check_weights<std::int8_t>(spec);
}

void check(const Call& call, std::ptrdiff_t out_height, std::ptrdiff_t out_width) {
    if (call.batch < 0) refuse("the batch is " + text(call.batch) + "; must not be negative");
    if (call.height < 1 || call.width < 1)
        refuse("the map is " + text(call.height) + " x " + text(call.width) + "; must be at least 1 x 1");
    if (out_height < 1 || out_width < 1)
        refuse("the output would be " + text(out_height) + " x " + text(out_width) +
               ": the padded map is smaller than the 3 x 3 kernel");
    if (call.batch > 0 && (!call.x || !call.y)) refuse("x and y must be given");
    need_levels(call.y_levels, "output");
    const int least = call.y_levels.is_signed ? -128 : 0;
    if (call.low < least || call.low > call.high || call.high > least + 255)
        refuse("low is " + text(call.low) + " and high is " + text(call.high) + "; must be ordered in " + text(least) +
               " .. " + text(least + 255));
    if (call.residual) {
        need_levels(call.residual_levels, "residual");
        if (call.residual_levels.scale > largest_scale) refuse("residual scale must be at most 1e20");
    }
    if (call.parts < 1 || call.parts > 1024) refuse("threads is " + text(call.parts) + "; must be in 1 .. 1024");
}

}  // namespace bitsmith
