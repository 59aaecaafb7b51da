// What a kernel reads: plain data only, so that this header is the same for every translation unit, whatever its
// instruction set. The arithmetic is written down once, in README.md; every kernel follows it bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bitsmith {

constexpr std::ptrdiff_t max_block_tiles = 128;

// One layer, packed for one instruction set.
//
// `u` is [block][tap][group][column][lane][4 bytes]. A block is 2 * lanes output channels (the last one may be a single
// column of lanes), a group is 4 bytes of the reduced dimension: 4 int8 channels or 2 int16 channels. Channels that do
// not exist are zero. `start` and `us` are [block][tap][column][lane], `bias` is [block][column][lane]. Where a kernel takes
// the T taps of a column together they are in columns: tap i * T + j of the transform is the (j * T + i)-th, and `u` is
// [block][j][group][i][column][lane][4 bytes]. `mul` is [chunk][tap][channel of the chunk], as the input transform reads
// it, 0 for channels that do not exist; behind its taps stands what is taken from tap (1, 1): offset and zero point.
struct Packed {
    std::ptrdiff_t channels_in;
    std::ptrdiff_t channels_out;
    std::ptrdiff_t groups;
    const std::uint8_t* u;
    const std::int32_t* start;   // what the accumulators begin with: base, less 128 * sum(u) where V is kept as V + 128
    const float* us;
    const float* bias;
    const std::int16_t* mul;
    const std::uint8_t* outside; // a pixel of the zero point, for what lies outside the image
    std::int32_t x_zero;         // in the type of x; `outside` and `mul` hold it too
    std::ptrdiff_t v_row;        // bytes of one row of V
    std::ptrdiff_t v_tap;        // bytes of all rows of V of one tap
    std::ptrdiff_t block_tiles;  // tiles transformed together
    std::ptrdiff_t group_tiles;  // tiles of a block multiplied and transformed back together
};

// One call: a batch of images and what is fused behind the convolution.
struct Pass {
    const std::uint8_t* x;       // [n][height][width][channels_in]
    std::uint8_t* y;             // [n][out_height][out_width][channels_out]
    const std::uint8_t* residual;  // as y, or null
    std::ptrdiff_t height, width, out_height, out_width;
    std::ptrdiff_t tiles_down, tiles_across;
    std::ptrdiff_t pad_top, pad_left;
    bool x_signed;
    bool residual_signed;
    std::int32_t residual_zero;  // in the type of the residual
    float residual_scale;
    float inverse;               // 1 / scale of y
    float low, high;             // limits of the level minus the zero point; ReLU is part of low
    std::int32_t y_zero;
};

// The share of one thread: tiles of the whole batch, and blocks of output channels.
struct Part {
    std::ptrdiff_t tile_begin, tile_end;
    std::ptrdiff_t block_begin, block_end;
    void* scratch;               // 64-byte aligned
};

// One implementation for one (tile, bits).
struct Kernel {
    int lanes;                   // output channels of a column; 1: u is [tap][channel out][channel in], unpacked
    bool bytes;                  // V is kept as unsigned bytes V + 128, else as int16
    int chunk;                   // channels of one step of the input transform: v_row is padded to it
    int rows;                    // tiles that its innermost loop takes at once
    int together;                // taps that it takes at once: 1, or those of a column
    void (*run)(const Packed&, const Pass&, const Part&);
    void (*multiply)(const Packed&, void* scratch);  // products alone, of group_tiles tiles and all whole blocks; or null
};

// Null where the library was built without it. `columns`: the one that takes the taps of a column at once, where the set
// has registers enough.
const Kernel* kernel_avx512_vnni(int tile, int bits, bool columns);
const Kernel* kernel_avx_vnni(int tile, int bits, bool columns);
const Kernel* kernel_avx2(int tile, int bits, bool columns);
const Kernel* kernel_reference(int tile, int bits);

}  // namespace bitsmith
