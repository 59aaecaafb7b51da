// A 3x3 convolution by Winograd's algorithm on integers: packed once, run on any number of images.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "buffer.h"
#include "isa.h"
#include "kernel.h"
#include "parallel.h"

namespace bitsmith {

// What a layer is made of. The arrays are read while it is made and not kept.
struct Spec {
    int tile = 2;                        // 2 or 4: F(2x2, 3x3) or F(4x4, 3x3)
    int bits = 8;                        // 8 or 16: of the transformed image and weights
    std::ptrdiff_t channels_in = 0;
    std::ptrdiff_t channels_out = 0;
    const void* u = nullptr;             // [taps][channels_out][channels_in], int8 or int16 as bits says
    const std::int16_t* mul = nullptr;   // [taps][channels_in]
    const std::int16_t* offset = nullptr;  // [channels_in], or null: taken from D at tap (1, 1)
    const float* us = nullptr;           // [taps][channels_out]
    const float* bias = nullptr;         // [channels_out], or null
    int x_zero = 0;                      // in the type of x
    bool x_signed = false;
    int pad_top = 1, pad_left = 1, pad_bottom = 1, pad_right = 1;
    Isa isa = Isa::reference;
};

// How 8-bit levels stand for real numbers: scale * (level - zero).
struct Levels {
    float scale = 1;
    int zero = 0;
    bool is_signed = false;
};

struct Call {
    const void* x = nullptr;             // [batch][height][width][channels_in]
    std::ptrdiff_t batch = 1, height = 0, width = 0;
    void* y = nullptr;                   // [batch][out_height][out_width][channels_out], must not overlap an input
    Levels y_levels;
    int low = 0, high = 255;             // y is clamped to them, in its own type
    bool relu = false;
    const void* residual = nullptr;      // as y, or null: added before ReLU
    Levels residual_levels;
    int parts = 1;                       // shares of the work, one for each thread
};

class Layer {
public:
    // Throws std::invalid_argument, with the reason, where the arithmetic could not be exact or the input is wrong.
    explicit Layer(const Spec& spec);

    // Thread-safe. Throws std::invalid_argument.
    void run(const Call& call, const ParallelFor& parallel_for) const;

    // For benchmarks: the products alone of a few tiles, `rounds` times. Returns how many multiply-adds that was.
    std::int64_t multiply(int rounds) const;

    std::ptrdiff_t out_height(std::ptrdiff_t height) const { return height + pads_[0] + pads_[2] - 2; }
    std::ptrdiff_t out_width(std::ptrdiff_t width) const { return width + pads_[1] + pads_[3] - 2; }
    std::size_t packed_bytes() const;
    Isa isa() const { return isa_; }

private:
    int tile_;
    Isa isa_;
    bool x_signed_;
    std::size_t scratch_bytes() const;

    int pads_[4];                        // top, left, bottom, right
    const Kernel* kernel_;
    Packed packed_;
    Buffer u_, start_, us_, bias_, mul_, outside_;
};

}  // namespace bitsmith
