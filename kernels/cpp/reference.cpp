// The contract in scalar code, one output channel of one tile at a time. It shares nothing with simd/ but the plain
// data of kernel.h; README.md has the equations.
#include <algorithm>
#include <cmath>

#include "bound.h"
#include "kernel.h"

namespace bitsmith {

namespace {

int level_of(const std::uint8_t* p, bool is_signed) { return is_signed ? static_cast<std::int8_t>(*p) : *p; }

// V[tap][channel] of a tile whose first pixel is at (top, left), int16
template <int Tile, int Bits>
void transform(const Packed& layer, const Pass& pass, std::ptrdiff_t image, std::ptrdiff_t top, std::ptrdiff_t left,
               std::int16_t* v) {
    constexpr int T = Tile + 2;
    const int* b = input_transform(Tile);
    for (std::ptrdiff_t c = 0; c < layer.channels_in; ++c) {
        int d[T][T], half[T][T];
        for (int i = 0; i < T; ++i)
            for (int j = 0; j < T; ++j) {
                const std::ptrdiff_t y = top + i, x = left + j;
                const bool inside = y >= 0 && y < pass.height && x >= 0 && x < pass.width;
                const std::ptrdiff_t at = ((image * pass.height + y) * pass.width + x) * layer.channels_in + c;
                d[i][j] = inside ? level_of(pass.x + at, pass.x_signed) - layer.x_zero : 0;
            }
        for (int i = 0; i < T; ++i)
            for (int j = 0; j < T; ++j) {
                half[i][j] = 0;
                for (int k = 0; k < T; ++k) half[i][j] += b[i * T + k] * d[k][j];
            }
        for (int i = 0; i < T; ++i)
            for (int j = 0; j < T; ++j) {
                int sum = 0;
                for (int k = 0; k < T; ++k) sum += half[i][k] * b[j * T + k];
                const std::int16_t* const mul = layer.mul + c * (T * T + 1);
                // the zero point is out of d already: the offset alone is left
                if (i * T + j == mean_tap(Tile)) sum -= mul[T * T] - layer.x_zero * mean_gain(Tile);
                int scaled = (sum * mul[i * T + j] + (1 << 14)) >> 15;
                if (Bits == 8) scaled = std::clamp(scaled, -128, 127);
                v[(i * T + j) * layer.channels_in + c] = static_cast<std::int16_t>(scaled);
            }
    }
}

// A^T f in the order of the contract
template <int Tile>
void transform_back(const float* f, std::ptrdiff_t stride, float* o, std::ptrdiff_t out_stride) {
    const float sum = f[stride] + f[2 * stride], difference = f[stride] - f[2 * stride];
    if (Tile == 2) {
        o[0] = f[0] + sum;
        o[out_stride] = difference - f[3 * stride];
        return;
    }
    const float sum2 = f[3 * stride] + f[4 * stride], difference2 = f[3 * stride] - f[4 * stride];
    o[0] = (f[0] + sum) + sum2;
    o[out_stride] = difference + 2 * difference2;
    o[2 * out_stride] = sum + 4 * sum2;
    o[3 * out_stride] = (difference + 8 * difference2) + f[5 * stride];
}

template <int Tile, int Bits>
void channel(const Packed& layer, const Pass& pass, std::ptrdiff_t image, std::ptrdiff_t top, std::ptrdiff_t left,
             const std::int16_t* v, std::ptrdiff_t k) {
    constexpr int T = Tile + 2, taps = T * T;
    float f[taps], half[Tile * T], o[Tile * Tile];
    for (int p = 0; p < taps; ++p) {
        const std::ptrdiff_t row = (p * layer.channels_out + k) * layer.channels_in;
        std::int32_t acc = layer.start[p * layer.channels_out + k];
        for (std::ptrdiff_t c = 0; c < layer.channels_in; ++c) {
            const int u = Bits == 8 ? reinterpret_cast<const std::int8_t*>(layer.u)[row + c]
                                    : reinterpret_cast<const std::int16_t*>(layer.u)[row + c];
            acc += v[p * layer.channels_in + c] * u;
        }
        f[p] = static_cast<float>(acc) * layer.us[p * layer.channels_out + k];
    }
    for (int j = 0; j < T; ++j) transform_back<Tile>(f + j, T, half + j, T);
    for (int i = 0; i < Tile; ++i) transform_back<Tile>(half + i * T, 1, o + i * Tile, 1);
    for (std::ptrdiff_t i = 0; i < std::min<std::ptrdiff_t>(Tile, pass.out_height - top); ++i)
        for (std::ptrdiff_t j = 0; j < std::min<std::ptrdiff_t>(Tile, pass.out_width - left); ++j) {
            const std::ptrdiff_t pixel = (image * pass.out_height + top + i) * pass.out_width + left + j;
            const std::ptrdiff_t at = pixel * layer.channels_out + k;
            float value = o[i * Tile + j] + layer.bias[k];
            if (pass.residual) {
                const int r = level_of(pass.residual + at, pass.residual_signed) - pass.residual_zero;
                value += static_cast<float>(r) * pass.residual_scale;
            }
            const float level = std::min(std::max(value * pass.inverse, pass.low), pass.high);
            const int rounded = static_cast<int>(std::nearbyint(level)) + pass.y_zero;
            pass.y[at] = static_cast<std::uint8_t>(rounded);
        }
}

template <int Tile, int Bits>
void run(const Packed& layer, const Pass& pass, const Part& part) {
    std::int16_t* const v = static_cast<std::int16_t*>(part.scratch);
    for (std::ptrdiff_t t = part.tile_begin; t < part.tile_end; ++t) {
        const std::ptrdiff_t left = t % pass.tiles_across * Tile;
        const std::ptrdiff_t top = t / pass.tiles_across % pass.tiles_down * Tile;
        const std::ptrdiff_t image = t / pass.tiles_across / pass.tiles_down;
        transform<Tile, Bits>(layer, pass, image, top - pass.pad_top, left - pass.pad_left, v);
        const std::ptrdiff_t end = std::min(part.block_end * 2, layer.channels_out);
        for (std::ptrdiff_t k = part.block_begin * 2; k < end; ++k)
            channel<Tile, Bits>(layer, pass, image, top, left, v, k);
    }
}

template <int Tile, int Bits>
constexpr Kernel kernel_of = {1, false, 1, 1, 1, run<Tile, Bits>, nullptr};

}  // namespace

const Kernel* kernel_reference(int tile, int bits) {
    if (tile == 2) return bits == 8 ? &kernel_of<2, 8> : &kernel_of<2, 16>;
    return bits == 8 ? &kernel_of<4, 8> : &kernel_of<4, 16>;
}

}  // namespace bitsmith
