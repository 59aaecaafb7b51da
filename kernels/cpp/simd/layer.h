// One thread's share of a layer, for the vectors S: tiles are transformed, multiplied and transformed back block by
// block, so that V stays in the second-level cache and the products in the first.
#pragma once

#include "../kernel.h"
#include "micro.h"
#include "transform.h"

namespace {

using bitsmith::max_block_tiles;
using bitsmith::Packed;
using bitsmith::Part;
using bitsmith::Pass;

// Where a tile lies: its first input pixel (may be outside the image) and what it writes.
struct Place {
    std::ptrdiff_t image, top, left;
    std::ptrdiff_t out;          // offset of its first output pixel, in pixels
    int rows, columns;           // of the output that exist
};

template <int Tile>
inline Place place_of(const Pass& pass, std::ptrdiff_t tile) {
    const std::ptrdiff_t across = tile % pass.tiles_across, rest = tile / pass.tiles_across;
    const std::ptrdiff_t down = rest % pass.tiles_down, image = rest / pass.tiles_down;
    const std::ptrdiff_t y = down * Tile, x = across * Tile;
    const std::ptrdiff_t below = pass.out_height - y, right = pass.out_width - x;
    return {image,
            y - pass.pad_top,
            x - pass.pad_left,
            (image * pass.out_height + y) * pass.out_width + x,
            static_cast<int>(below < Tile ? below : Tile),
            static_cast<int>(right < Tile ? right : Tile)};
}

// One chunk of channels of one tile: V[tap] of `count` channels, stored at v + tap * v_tap.
template <class S, int Tile, int Bits, bool Signed, bool Partial>
[[gnu::always_inline]] inline void input_chunk(const std::uint8_t* const* pixel, std::ptrdiff_t channel, int count,
                                               const Packed& layer, std::uint8_t* v) {
    constexpr int T = Tile + 2, taps = T * T;
    typename S::Word d[taps];
    unroll<taps>([&](auto p) __attribute__((always_inline)) {
        d[p] = S::template widen<Signed, Partial>(pixel[p] + channel, count);
    });
    unroll<T>([&](auto j) __attribute__((always_inline)) { transform_input<S, Tile, T>(d + j); });
    unroll<T>([&](auto i) __attribute__((always_inline)) { transform_input<S, Tile, 1>(d + i * T); });
    d[T + 1] = S::sub16(d[T + 1], S::word(layer.x_zero * constant_gain<Tile>));
    unroll<taps>([&](auto p) __attribute__((always_inline)) {
        const typename S::Word scaled = S::scale16(d[p], S::word(layer.mul[p]));
        if constexpr (Bits == 16)
            S::store_words(v + p * layer.v_tap, scaled);
        else if constexpr (S::dots_bytes)
            S::store_bytes_offset(v + p * layer.v_tap, scaled);
        else
            S::store_words(v + p * layer.v_tap, S::saturate8(scaled));
    });
}

template <class S, int Tile, int Bits, bool Signed>
void input_tile(const Packed& layer, const Pass& pass, const Place& place, std::uint8_t* v) {
    constexpr int T = Tile + 2;
    constexpr int size = Bits == 8 && S::dots_bytes ? 1 : 2;
    const std::ptrdiff_t channels = layer.channels_in;
    const std::uint8_t* pixel[T * T];
    const std::ptrdiff_t first = (place.image * pass.height + place.top) * pass.width + place.left;
    const bool inside = place.top >= 0 && place.left >= 0 && place.top + T <= pass.height &&
                        place.left + T <= pass.width;
    for (int i = 0; i < T; ++i)
        for (int j = 0; j < T; ++j) {
            const std::ptrdiff_t y = place.top + i, x = place.left + j;
            const bool exists = inside || (y >= 0 && y < pass.height && x >= 0 && x < pass.width);
            pixel[i * T + j] = exists ? pass.x + (first + i * pass.width + j) * channels : layer.outside;
        }
    std::ptrdiff_t c = 0;
    for (; c + S::words <= channels; c += S::words)
        input_chunk<S, Tile, Bits, Signed, false>(pixel, c, S::words, layer, v + c * size);
    if (c < channels)
        input_chunk<S, Tile, Bits, Signed, true>(pixel, c, static_cast<int>(channels - c), layer, v + c * size);
}

// `count` output channels of one tile; f holds the scaled products, [tap][tile][column][lane].
template <class S, int Tile, bool Residual>
[[gnu::always_inline]] inline void output_tile(const Packed& layer, const Pass& pass, const Place& place,
                                               const float* f, std::ptrdiff_t tap, std::ptrdiff_t channel,
                                               typename S::Real bias, int count) {
    constexpr int T = Tile + 2;
    using R = typename S::Real;
    R half[Tile * T], o[Tile * Tile];
    unroll<T>([&](auto j) __attribute__((always_inline)) {
        const auto product = [&](int i) __attribute__((always_inline)) { return S::load(f + (i * T + j) * tap); };
        transform_output<S, Tile, T>(product, half + j);
    });
    const R inverse = S::real(pass.inverse), low = S::real(pass.low), high = S::real(pass.high);
    unroll<Tile>([&](auto i) __attribute__((always_inline)) {
        const auto value_of = [&](int j) __attribute__((always_inline)) { return half[i * T + j]; };
        transform_output<S, Tile, 1>(value_of, o + i * Tile);
        unroll<Tile>([&](auto j) __attribute__((always_inline)) {
            if (i < place.rows && j < place.columns) {
                const std::ptrdiff_t at = (place.out + i * pass.out_width + j) * layer.channels_out + channel;
                R value = S::add(o[i * Tile + j], bias);
                if constexpr (Residual) {
                    const typename S::Int r = S::load_levels(pass.residual + at, pass.residual_signed, count);
                    const R real = S::to_real(S::sub32(r, S::integer(pass.residual_zero)));
                    value = S::add(value, S::mul(real, S::real(pass.residual_scale)));
                }
                // the clamp comes before the conversion, which is undefined out of range; its limits are integers
                const R level = S::min(S::max(S::mul(value, inverse), low), high);
                S::store_levels(pass.y + at, S::add32(S::to_int(level), S::integer(pass.y_zero)), count);
            }
        });
    });
}

template <class S, int Tile, int Bits, int N>
void channel_block(const Packed& layer, const Pass& pass, const Place* place, std::ptrdiff_t tiles,
                   const std::uint8_t* v, std::ptrdiff_t block, float* f) {
    constexpr int taps = (Tile + 2) * (Tile + 2);
    constexpr bool bytes = Bits == 8 && S::dots_bytes;
    constexpr std::ptrdiff_t whole = 2 * S::lanes;
    const std::uint8_t* u = layer.u + block * taps * layer.groups * whole * 4;
    const std::ptrdiff_t tap = layer.group_tiles * N * S::lanes;
    for (int p = 0; p < taps; ++p) {
        const std::ptrdiff_t at = block * taps * whole + p * N * S::lanes;
        product<S, bytes, N>(tiles, v + p * layer.v_tap, layer.v_row, u + p * layer.groups * N * S::lanes * 4,
                             layer.groups, layer.start + at, layer.us + at, f + p * tap);
    }
    unroll<N>([&](auto j) __attribute__((always_inline)) {
        const std::ptrdiff_t channel = block * whole + j * S::lanes;
        const std::ptrdiff_t left = layer.channels_out - channel;
        const int count = static_cast<int>(left < S::lanes ? left : S::lanes);
        const typename S::Real bias = S::load(layer.bias + channel);
        for (std::ptrdiff_t t = 0; t < tiles; ++t) {
            const float* from = f + (t * N + j) * S::lanes;
            if (pass.residual)
                output_tile<S, Tile, true>(layer, pass, place[t], from, tap, channel, bias, count);
            else
                output_tile<S, Tile, false>(layer, pass, place[t], from, tap, channel, bias, count);
        }
    });
}

template <class S, int Tile, int Bits>
void run(const Packed& layer, const Pass& pass, const Part& part) {
    constexpr int taps = (Tile + 2) * (Tile + 2);
    std::uint8_t* const v = static_cast<std::uint8_t*>(part.scratch);
    float* const f = reinterpret_cast<float*>(v + taps * layer.v_tap);
    const std::ptrdiff_t total = part.tile_end - part.tile_begin;
    const std::ptrdiff_t blocks = (total + layer.block_tiles - 1) / layer.block_tiles;
    std::ptrdiff_t first = part.tile_begin;
    for (std::ptrdiff_t b = 0; b < blocks; ++b) {
        const std::ptrdiff_t tiles = total / blocks + (b < total % blocks);
        Place place[max_block_tiles];
        for (std::ptrdiff_t t = 0; t < tiles; ++t) {
            place[t] = place_of<Tile>(pass, first + t);
            if (pass.x_signed)
                input_tile<S, Tile, Bits, true>(layer, pass, place[t], v + t * layer.v_row);
            else
                input_tile<S, Tile, Bits, false>(layer, pass, place[t], v + t * layer.v_row);
        }
        const std::ptrdiff_t groups = (tiles + layer.group_tiles - 1) / layer.group_tiles;
        for (std::ptrdiff_t k = part.block_begin; k < part.block_end; ++k) {
            const bool narrow = layer.channels_out - k * 2 * S::lanes <= S::lanes;
            for (std::ptrdiff_t g = 0, t = 0; g < groups; ++g) {
                const std::ptrdiff_t now = tiles / groups + (g < tiles % groups);
                (narrow ? channel_block<S, Tile, Bits, 1> : channel_block<S, Tile, Bits, 2>)(
                    layer, pass, place + t, now, v + t * layer.v_row, k, f);
                t += now;
            }
        }
        first += tiles;
    }
}

template <class S, int Tile, int Bits>
constexpr bitsmith::Kernel kernel_of = {S::lanes, Bits == 8 && S::dots_bytes, S::words, S::rows,
                                        run<S, Tile, Bits>};

template <class S>
const bitsmith::Kernel* find_kernel(int tile, int bits) {
    if (tile == 2) return bits == 8 ? &kernel_of<S, 2, 8> : &kernel_of<S, 2, 16>;
    return bits == 8 ? &kernel_of<S, 4, 8> : &kernel_of<S, 4, 16>;
}

}  // namespace
