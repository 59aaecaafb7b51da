#include "layer.h"

#include <algorithm>

#include "check.h"
#include "pack.h"

namespace bitsmith {

namespace {

const Kernel* find(Isa isa, int tile, int bits, bool columns) {
    switch (isa) {
        case Isa::avx512_vnni: return kernel_avx512_vnni(tile, bits, columns);
        case Isa::avx_vnni: return kernel_avx_vnni(tile, bits, columns);
        case Isa::avx2: return kernel_avx2(tile, bits, columns);
        default: return kernel_reference(tile, bits);
    }
}

std::ptrdiff_t round_up(std::ptrdiff_t a, std::ptrdiff_t b) { return (a + b - 1) / b * b; }

// The taps of a column are multiplied together where their weights, read again for every few tiles, stay in the
// first-level cache.
bool by_columns(const Spec& spec) {
    constexpr std::ptrdiff_t most_bytes = 24 << 10;
    return (spec.tile + 2) * spec.channels_in * (spec.bits / 8) * 32 <= most_bytes;
}

// Tiles whose products are held at once: few, so that they stay in the first-level cache; twice as many where the
// weights that they share are too large to stay in the second-level one and would be fetched again for each group.
std::ptrdiff_t group_tiles_of(const Kernel& kernel, std::ptrdiff_t weight_bytes_of_block) {
    constexpr std::ptrdiff_t many_bytes = 200 << 10;
    if (kernel.together > 1) return 24;  // a multiple of every `rows`: one or two tiles alone take nearly the time of three
    return kernel.rows * (weight_bytes_of_block > many_bytes ? 2 : 1);
}

// Tiles transformed at once: as many as leave V in half of a second-level cache, because all weights are streamed again
// for the next ones. Whole innermost loops, as far as that goes.
std::ptrdiff_t block_tiles_of(const Kernel& kernel, std::ptrdiff_t group_tiles, std::ptrdiff_t v_bytes_of_tile) {
    constexpr std::ptrdiff_t most_bytes = 512 << 10;
    const std::ptrdiff_t tiles = std::clamp(most_bytes / v_bytes_of_tile, group_tiles, max_block_tiles);
    return tiles / kernel.rows * kernel.rows;
}

}  // namespace

Layer::Layer(const Spec& spec)
    : tile_(spec.tile),
      isa_(spec.isa),
      x_signed_(spec.x_signed),
      pads_{spec.pad_top, spec.pad_left, spec.pad_bottom, spec.pad_right} {
    check(spec);
    kernel_ = find(spec.isa, spec.tile, spec.bits, by_columns(spec));
    const int taps = (tile_ + 2) * (tile_ + 2);
    const int size = kernel_->bytes ? 1 : 2;
    packed_.channels_in = spec.channels_in;
    packed_.channels_out = spec.channels_out;
    packed_.groups = (spec.channels_in * size + 3) / 4;
    packed_.x_zero = spec.x_zero;
    packed_.v_row = round_up(spec.channels_in, kernel_->chunk) * size;
    packed_.group_tiles = group_tiles_of(*kernel_, taps * packed_.groups * 2 * kernel_->lanes * 4);
    packed_.block_tiles = block_tiles_of(*kernel_, packed_.group_tiles, packed_.v_row * taps);
    // an odd number of lines beyond 4096 bytes, so that the taps of one tile do not share a set of the cache
    packed_.v_tap = round_up(packed_.block_tiles * packed_.v_row, 4096) + 3 * 64;
    pack(spec, *kernel_, {u_, start_, us_, bias_, mul_, outside_});
    packed_.u = u_.as<std::uint8_t>();
    packed_.start = start_.as<std::int32_t>();
    packed_.us = us_.as<float>();
    packed_.bias = bias_.as<float>();
    packed_.mul = mul_.as<std::int16_t>();
    packed_.outside = outside_.as<std::uint8_t>();
}

std::size_t Layer::packed_bytes() const {
    return u_.size() + start_.size() + us_.size() + bias_.size() + mul_.size() + outside_.size();
}

std::size_t Layer::scratch_bytes() const {
    const std::size_t products = static_cast<std::size_t>(packed_.group_tiles * 2 * kernel_->lanes) * sizeof(float);
    return static_cast<std::size_t>((tile_ + 2) * (tile_ + 2)) * (static_cast<std::size_t>(packed_.v_tap) + products);
}

std::int64_t Layer::multiply(int rounds) const {
    if (!kernel_->multiply) return 0;
    Buffer scratch(scratch_bytes());
    for (int i = 0; i < rounds; ++i) kernel_->multiply(packed_, scratch.as<void>());
    const std::ptrdiff_t whole = 2 * kernel_->lanes;
    const std::ptrdiff_t channels = packed_.channels_out / whole * whole * packed_.channels_in;
    return static_cast<std::int64_t>(rounds) * (tile_ + 2) * (tile_ + 2) * packed_.group_tiles * channels;
}

void Layer::run(const Call& call, const ParallelFor& parallel_for) const {
    check(call, out_height(call.height), out_width(call.width));
    Pass pass{};
    pass.x = static_cast<const std::uint8_t*>(call.x);
    pass.y = static_cast<std::uint8_t*>(call.y);
    pass.residual = static_cast<const std::uint8_t*>(call.residual);
    pass.height = call.height;
    pass.width = call.width;
    pass.out_height = out_height(call.height);
    pass.out_width = out_width(call.width);
    pass.tiles_down = (pass.out_height + tile_ - 1) / tile_;
    pass.tiles_across = (pass.out_width + tile_ - 1) / tile_;
    pass.pad_top = pads_[0];
    pass.pad_left = pads_[1];
    pass.x_signed = x_signed_;
    pass.residual_signed = call.residual_levels.is_signed;
    pass.residual_zero = call.residual_levels.zero;
    pass.residual_scale = call.residual_levels.scale;
    pass.inverse = 1.0f / call.y_levels.scale;
    // ReLU before the rounding is a clamp at level zero after it: both are monotone and 0 rounds to 0
    const int low = call.low - call.y_levels.zero;
    pass.low = static_cast<float>(call.relu ? std::max(low, 0) : low);
    pass.high = static_cast<float>(call.high - call.y_levels.zero);
    pass.y_zero = call.y_levels.zero;

    const std::ptrdiff_t tiles = call.batch * pass.tiles_down * pass.tiles_across;
    const std::ptrdiff_t whole = 2 * kernel_->lanes;
    const std::ptrdiff_t blocks = (packed_.channels_out + whole - 1) / whole;
    // Small maps: each thread takes some output channels and transforms the whole input again, because weights are
    // then most of the work. Large maps: each thread takes some tiles.
    constexpr std::ptrdiff_t few_tiles = 12;
    const bool by_channels = call.parts > 1 && tiles < few_tiles * call.parts && blocks >= call.parts;
    const std::ptrdiff_t parts = std::min<std::ptrdiff_t>(call.parts, by_channels ? blocks : tiles);
    const auto work = [&](int i) {
        static thread_local Buffer scratch;
        Part part{0, tiles, 0, blocks, scratch.reserve(scratch_bytes())};
        if (by_channels) {
            part.block_begin = blocks * i / parts;
            part.block_end = blocks * (i + 1) / parts;
        } else {
            part.tile_begin = tiles * i / parts;
            part.tile_end = tiles * (i + 1) / parts;
        }
        kernel_->run(packed_, pass, part);
    };
    if (parts > 1)
        parallel_for(static_cast<int>(parts), work);
    else if (parts == 1)
        work(0);
}

}  // namespace bitsmith
