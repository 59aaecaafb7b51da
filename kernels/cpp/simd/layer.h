// One thread's share of a layer, for the vectors S: tiles are transformed, multiplied and transformed back block by
// block, so that V stays in the second-level cache and the products in the first.
#pragma once

#include <algorithm>

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

// B^T along the row of every column of a tile, the scales of the taps, and V[tap] of `count` channels at v + tap * v_tap.
// `d`: [row][column], B^T already applied down the columns; it is left as it is. `mul`: [tap][channel], and behind
// the taps what is taken from tap (1, 1).
template <class S, int Tile, int Bits>
[[gnu::always_inline]] inline void finish_tile(const typename S::Word* d, const Packed& layer, const std::int16_t* mul,
                                               std::uint8_t* v) {
    constexpr int T = Tile + 2;
    unroll<T>([&](auto i) __attribute__((always_inline)) {
        typename S::Word row[T];
        unroll<T>([&](auto j) __attribute__((always_inline)) { row[j] = d[i * T + j]; });
        transform_input<S, Tile, 1>(row);
        if constexpr (i == 1) row[1] = S::sub16(row[1], S::load_words(mul + T * T * S::words));
        unroll<T>([&](auto j) __attribute__((always_inline)) {
            constexpr int p = i * T + j;
            const typename S::Word scaled = S::scale16(row[j], S::load_words(mul + p * S::words));
            if constexpr (Bits == 16)
                S::store_words(v + p * layer.v_tap, scaled);
            else if constexpr (S::dots_bytes)
                S::store_bytes_offset(v + p * layer.v_tap, scaled);
            else
                S::store_words(v + p * layer.v_tap, S::saturate8(scaled));
        });
    });
}

// `count` channels, from `channel` on, of `tiles` tiles that lie side by side from `place` on. Neighbours share two columns
// of pixels: what B^T made of them is kept.
template <class S, int Tile, int Bits, bool Signed, bool Partial>
void input_strip(const Packed& layer, const Pass& pass, const Place& place, std::ptrdiff_t tiles, std::ptrdiff_t channel,
                 int count, std::uint8_t* v) {
    constexpr int T = Tile + 2;
    const std::ptrdiff_t pixel = layer.channels_in;
    const std::uint8_t* const outside = layer.outside + channel;
    const std::int16_t* const mul = layer.mul + channel * (T * T + 1);
    const std::uint8_t* row[T];      // the first pixel of the image's rows; where there is none, one that stands for all
    std::ptrdiff_t step[T];
    unroll<T>([&](auto i) __attribute__((always_inline)) {
        const std::ptrdiff_t y = place.top + i;
        const bool exists = y >= 0 && y < pass.height;
        row[i] = exists ? pass.x + (place.image * pass.height + y) * pass.width * pixel + channel : outside;
        step[i] = exists ? pixel : 0;
    });
    typename S::Word d[T * T];
    const auto column = [&](auto j, std::ptrdiff_t x, bool exists) __attribute__((always_inline)) {
        unroll<T>([&](auto i) __attribute__((always_inline)) {
            d[i * T + j] = S::template widen<Signed, Partial>(exists ? row[i] + x * step[i] : outside, count);
        });
        transform_input<S, Tile, T>(d + j);
    };
    const auto exists = [&](std::ptrdiff_t x) { return x >= 0 && x < pass.width; };
    std::ptrdiff_t x = place.left;
    unroll<2>([&](auto j) __attribute__((always_inline)) { column(j, x + j, exists(x + j)); });
    for (std::ptrdiff_t t = 0; t < tiles; ++t, x += Tile, v += layer.v_row) {
        if (x + 2 >= 0 && x + T <= pass.width)
            unroll<Tile>([&](auto j) __attribute__((always_inline)) {
                column(std::integral_constant<int, j + 2>(), x + j + 2, true);
            });
        else
            unroll<Tile>([&](auto j) __attribute__((always_inline)) {
                column(std::integral_constant<int, j + 2>(), x + j + 2, exists(x + j + 2));
            });
        finish_tile<S, Tile, Bits>(d, layer, mul, v);
        unroll<T>([&](auto i) __attribute__((always_inline)) {
            d[i * T] = d[i * T + Tile];
            d[i * T + 1] = d[i * T + Tile + 1];
        });
    }
}

// V of `tiles` tiles.
template <class S, int Tile, int Bits, bool Signed>
void input_tiles(const Packed& layer, const Pass& pass, const Place* place, std::ptrdiff_t tiles, std::uint8_t* v) {
    constexpr int size = Bits == 8 && S::dots_bytes ? 1 : 2;
    const std::ptrdiff_t channels = layer.channels_in;
    for (std::ptrdiff_t first = 0, n; first < tiles; first += n) {
        for (n = 1; first + n < tiles && place[first + n].left > place[first].left;) ++n;
        std::uint8_t* const to = v + first * layer.v_row;
        std::ptrdiff_t c = 0;
        for (; c + S::words <= channels; c += S::words)
            input_strip<S, Tile, Bits, Signed, false>(layer, pass, place[first], n, c, S::words, to + c * size);
        if (c < channels)
            input_strip<S, Tile, Bits, Signed, true>(layer, pass, place[first], n, c, static_cast<int>(channels - c),
                                                     to + c * size);
    }
}

// What follows the convolution, of `count` channels of the pixel that is written at `at`: bias, residual, ReLU, rounding.
// Levels without y's zero point.
template <class S, bool Residual>
[[gnu::always_inline]] inline typename S::Int level_of(const Pass& pass, typename S::Real value, typename S::Real bias,
                                                       std::ptrdiff_t at, int count) {
    value = S::add(value, bias);
    if constexpr (Residual) {
        const typename S::Int r = S::load_levels(pass.residual + at, pass.residual_signed, count);
        const typename S::Real real = S::to_real(S::sub32(r, S::integer(pass.residual_zero)));
        value = S::add(value, S::mul(real, S::real(pass.residual_scale)));
    }
    // the clamp comes before the conversion, which is undefined out of range; its limits are integers
    const typename S::Real level = S::mul(value, S::real(pass.inverse));
    return S::to_int(S::min(S::max(level, S::real(pass.low)), S::real(pass.high)));
}

// `count` output channels of one tile. f holds the scaled products, [tap][tile][column][lane], or with Columns what A^T
// made of them down the columns: [row of the output][column of taps][tile][column][lane].
template <class S, int Tile, bool Columns, bool Residual>
[[gnu::always_inline]] inline void output_tile(const Packed& layer, const Pass& pass, const Place& place,
                                               const float* f, std::ptrdiff_t tap, std::ptrdiff_t channel, int count) {
    constexpr int T = Tile + 2;
    using R = typename S::Real;
    R half[Tile * T], o[Tile];
    const auto loaded = [&](int at) __attribute__((always_inline)) { return S::load(f + at * tap); };
    if constexpr (!Columns)
        unroll<T>([&](auto j) __attribute__((always_inline)) {
            const auto product = [&](int i) __attribute__((always_inline)) { return loaded(i * T + j); };
            transform_output<S, Tile, T>(product, half + j);
        });
    const R bias = S::load(layer.bias + channel);
    unroll<Tile>([&](auto i) __attribute__((always_inline)) {
        const auto value_of = [&](int j) __attribute__((always_inline)) {
            if constexpr (Columns) return loaded(i * T + j);
            else return half[i * T + j];
        };
        transform_output<S, Tile, 1>(value_of, o);
        unroll<Tile>([&](auto j) __attribute__((always_inline)) {
            if (i < place.rows && j < place.columns) {
                const std::ptrdiff_t at = (place.out + i * pass.out_width + j) * layer.channels_out + channel;
                const typename S::Int level = level_of<S, Residual>(pass, o[j], bias, at, count);
                S::store_levels(pass.y + at, S::add32(level, S::integer(pass.y_zero)), count);
            }
        });
    });
}

// Both columns of lanes of a whole tile: two pixels are narrowed to bytes together.
template <class S, int Tile, bool Residual>
[[gnu::always_inline]] inline void output_both(const Packed& layer, const Pass& pass, const Place& place,
                                               const float* f, std::ptrdiff_t tap, std::ptrdiff_t channel) {
    constexpr int T = Tile + 2;
    const typename S::Int zero = S::words_of(pass.y_zero);
    unroll<Tile>([&](auto i) __attribute__((always_inline)) {
        const std::ptrdiff_t at = (place.out + i * pass.out_width) * layer.channels_out + channel;
        typename S::Int level[2][Tile];
        unroll<2>([&](auto n) __attribute__((always_inline)) {
            const auto value_of = [&](int j) __attribute__((always_inline)) {
                return S::load(f + (i * T + j) * tap + n * S::lanes);
            };
            typename S::Real o[Tile];
            transform_output<S, Tile, 1>(value_of, o);
            const typename S::Real bias = S::load(layer.bias + channel + n * S::lanes);
            unroll<Tile>([&](auto j) __attribute__((always_inline)) {
                const std::ptrdiff_t there = at + j * layer.channels_out + n * S::lanes;
                level[n][j] = level_of<S, Residual>(pass, o[j], bias, there, S::lanes);
            });
        });
        unroll<Tile / 2>([&](auto pair) __attribute__((always_inline)) {
            constexpr int j = 2 * pair;
            std::uint8_t* const y = pass.y + at + j * layer.channels_out;
            S::store_pixels(y, y + layer.channels_out, level[0][j], level[1][j], level[0][j + 1], level[1][j + 1], zero);
        });
    });
}

// Output channels of one tile, in N columns of lanes from `channel` on.
template <class S, int Tile, bool Columns, int N, bool Residual>
[[gnu::always_inline]] inline void output(const Packed& layer, const Pass& pass, const Place& place, const float* f,
                                          std::ptrdiff_t tap, std::ptrdiff_t channel) {
    const std::ptrdiff_t left = layer.channels_out - channel;
    if constexpr (Columns && N == 2)
        if (left >= 2 * S::lanes && place.rows == Tile && place.columns == Tile)
            return output_both<S, Tile, Residual>(layer, pass, place, f, tap, channel);
    for (int n = 0; n < N; ++n) {
        const int count = static_cast<int>(std::min<std::ptrdiff_t>(left - n * S::lanes, S::lanes));
        output_tile<S, Tile, Columns, Residual>(layer, pass, place, f + n * S::lanes, tap, channel + n * S::lanes, count);
    }
}

// f of `tiles` tiles and the block's output channels.
template <class S, int Tile, int Bits, bool Columns, int N>
void multiply_block(const Packed& layer, std::ptrdiff_t tiles, const std::uint8_t* v, std::ptrdiff_t block, float* f) {
    constexpr int T = Tile + 2, taps = T * T;
    constexpr bool bytes = Bits == 8 && S::dots_bytes;
    constexpr std::ptrdiff_t whole = 2 * S::lanes;
    const std::uint8_t* u = layer.u + block * taps * layer.groups * whole * 4;
    const std::ptrdiff_t tap = layer.group_tiles * N * S::lanes;
    constexpr int together = Columns ? T : 1;
    for (int p = 0; p < taps / together; ++p) {
        const std::ptrdiff_t at = block * taps * whole + p * together * N * S::lanes;
        const std::uint8_t* const weights = u + p * together * layer.groups * N * S::lanes * 4;
        const std::uint8_t* const rows = v + p * layer.v_tap;
        if constexpr (Columns)
            product_column<S, bytes, Tile, N>(tiles, rows, T * layer.v_tap, layer.v_row, weights, layer.groups,
                                              layer.start + at, layer.us + at, f + p * tap, T * tap);
        else
            product<S, bytes, N>(tiles, rows, layer.v_row, weights, layer.groups, layer.start + at, layer.us + at,
                                 f + p * tap);
    }
}

template <class S, int Tile, int Bits, bool Columns, int N>
void channel_block(const Packed& layer, const Pass& pass, const Place* place, std::ptrdiff_t tiles,
                   const std::uint8_t* v, std::ptrdiff_t block, float* f) {
    multiply_block<S, Tile, Bits, Columns, N>(layer, tiles, v, block, f);
    constexpr std::ptrdiff_t whole = 2 * S::lanes;
    const std::ptrdiff_t tap = layer.group_tiles * N * S::lanes;
    for (std::ptrdiff_t t = 0; t < tiles; ++t) {
        const float* const from = f + t * N * S::lanes;
        if (pass.residual)
            output<S, Tile, Columns, N, true>(layer, pass, place[t], from, tap, block * whole);
        else
            output<S, Tile, Columns, N, false>(layer, pass, place[t], from, tap, block * whole);
    }
}

// The i-th of n nearly equal shares of `total`, in multiples of Step but for the last.
template <std::ptrdiff_t Step>
std::ptrdiff_t share(std::ptrdiff_t total, std::ptrdiff_t n, std::ptrdiff_t i) {
    const std::ptrdiff_t steps = (total + Step - 1) / Step;
    const auto end = [&](std::ptrdiff_t k) { return std::min((steps / n * k + std::min(k, steps % n)) * Step, total); };
    return end(i + 1) - end(i);
}

template <class S, int Tile, int Bits, bool Columns>
void run(const Packed& layer, const Pass& pass, const Part& part) {
    constexpr int taps = (Tile + 2) * (Tile + 2);
    constexpr std::ptrdiff_t step = Columns ? S::template column_rows<Tile> : 1;
    std::uint8_t* const v = static_cast<std::uint8_t*>(part.scratch);
    float* const f = reinterpret_cast<float*>(v + taps * layer.v_tap);
    const std::ptrdiff_t total = part.tile_end - part.tile_begin;
    const std::ptrdiff_t blocks = (total + layer.block_tiles - 1) / layer.block_tiles;
    std::ptrdiff_t first = part.tile_begin;
    for (std::ptrdiff_t b = 0; b < blocks; ++b) {
        const std::ptrdiff_t tiles = share<step>(total, blocks, b);
        Place place[max_block_tiles];
        for (std::ptrdiff_t t = 0; t < tiles; ++t) place[t] = place_of<Tile>(pass, first + t);
        if (pass.x_signed)
            input_tiles<S, Tile, Bits, true>(layer, pass, place, tiles, v);
        else
            input_tiles<S, Tile, Bits, false>(layer, pass, place, tiles, v);
        const std::ptrdiff_t groups = (tiles + layer.group_tiles - 1) / layer.group_tiles;
        for (std::ptrdiff_t k = part.block_begin; k < part.block_end; ++k) {
            const bool narrow = layer.channels_out - k * 2 * S::lanes <= S::lanes;
            for (std::ptrdiff_t g = 0, t = 0; g < groups; ++g) {
                const std::ptrdiff_t now = share<step>(tiles, groups, g);
                (narrow ? channel_block<S, Tile, Bits, Columns, 1> : channel_block<S, Tile, Bits, Columns, 2>)(
                    layer, pass, place + t, now, v + t * layer.v_row, k, f);
                t += now;
            }
        }
        first += tiles;
    }
}

template <class S, int Tile, int Bits, bool Columns>
void multiply(const Packed& layer, void* scratch) {
    std::uint8_t* const v = static_cast<std::uint8_t*>(scratch);
    float* const f = reinterpret_cast<float*>(v + (Tile + 2) * (Tile + 2) * layer.v_tap);
    for (std::ptrdiff_t k = 0; (k + 1) * 2 * S::lanes <= layer.channels_out; ++k)
        multiply_block<S, Tile, Bits, Columns, 2>(layer, layer.group_tiles, v, k, f);
}

template <class S, int Tile, int Bits, bool Columns>
constexpr bitsmith::Kernel kernel_of = {S::lanes,
                                        Bits == 8 && S::dots_bytes,
                                        S::words,
                                        Columns ? S::template column_rows<Tile> : S::rows,
                                        Columns ? Tile + 2 : 1,
                                        run<S, Tile, Bits, Columns>,
                                        multiply<S, Tile, Bits, Columns>};

template <class S, bool Columns>
const bitsmith::Kernel* kernel_by(int tile, int bits) {
    if (tile == 2) return bits == 8 ? &kernel_of<S, 2, 8, Columns> : &kernel_of<S, 2, 16, Columns>;
    return bits == 8 ? &kernel_of<S, 4, 8, Columns> : &kernel_of<S, 4, 16, Columns>;
}

template <class S>
const bitsmith::Kernel* find_kernel(int tile, int bits, bool columns) {
    if constexpr (S::template column_rows<2> > 0)
        if (columns) return kernel_by<S, true>(tile, bits);
    return kernel_by<S, false>(tile, bits);
}

}  // namespace
