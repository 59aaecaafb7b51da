#include "binary_layer.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace bitsmith {

namespace {

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument(why); }

std::size_t bytes_of(std::ptrdiff_t words) { return static_cast<std::size_t>(words) * sizeof(std::uint64_t); }

std::uint64_t word_of(const std::uint8_t* bits, std::ptrdiff_t channels, std::ptrdiff_t word) {
    std::uint64_t found = 0;
    for (std::ptrdiff_t c = word * 64; c < channels && c < word * 64 + 64; ++c)
        found |= static_cast<std::uint64_t>(bits[c / 8] >> (c % 8) & 1) << (c % 64);
    return found;
}

void keep(Buffer& buffer, const float* from, std::ptrdiff_t count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(float);
    std::memcpy(buffer.reserve(bytes), from, bytes);
}

void share(std::ptrdiff_t units, int parts, const ParallelFor& parallel_for,
           const std::function<void(std::ptrdiff_t, std::ptrdiff_t)>& work) {
    const int n = static_cast<int>(std::min<std::ptrdiff_t>(units, std::max(parts, 1)));
    if (n > 1)
        parallel_for(n, [&](int i) { work(units * i / n, units * (i + 1) / n); });
    else if (n == 1)
        work(0, units);
}

}  // namespace

void check(const BinarySpec& spec) {
    constexpr std::ptrdiff_t most_products = 1 << 24, most = 1 << 20;  // float32 holds every integer up to 2^24
    const auto within = [](const char* what, std::ptrdiff_t value, std::ptrdiff_t low, std::ptrdiff_t high) {
        if (value < low || value > high)
            refuse(std::string(what) + " is " + std::to_string(value) + "; must be in " + std::to_string(low) + " .. " +
                   std::to_string(high));
    };
    within("channels_in", spec.channels_in, 1, most_products);
    within("channels_out", spec.channels_out, 1, most);
    for (int axis = 0; axis < 2; ++axis) {
        within("a side of the kernel", spec.kernel[axis], 1, 1024);
        within("a stride", spec.strides[axis], 1, 1024);
        within("a dilation", spec.dilations[axis], 1, 1024);
    }
    for (const std::ptrdiff_t pad : spec.pads) within("a pad", pad, 0, 1 << 16);
    const std::ptrdiff_t products = spec.channels_in * spec.kernel[0] * spec.kernel[1];
    if (products > most_products)
        refuse(std::to_string(products) + " products to a sum; must be at most 2^24, which float32 holds exactly");
}

Scratch::Taken::Taken(Scratch& owner, std::size_t bytes) : owner_(owner) {
    {
        const std::lock_guard<std::mutex> lock(owner.mutex_);
        if (!owner.free_.empty()) {
            buffer_ = std::move(owner.free_.back());
            owner.free_.pop_back();
        }
    }
    if (!buffer_) buffer_ = std::make_unique<Buffer>();
    buffer_->reserve(bytes);
}

Scratch::Taken::~Taken() {
    const std::lock_guard<std::mutex> lock(owner_.mutex_);
    owner_.free_.push_back(std::move(buffer_));
}

// -- convolutions ------------------------------------------------------------------------------------------------------

// What follows from the size of the maps. A packed image is [row][word][phase][pitch], padding included: columns that
// lie a stride apart are neighbours, so that what neighbouring pixels read always is.
struct BinaryConv::Map {
    std::ptrdiff_t height, width, out_height, out_width;
    std::ptrdiff_t rows, columns;           // of the padded image, as far as it is read
    std::ptrdiff_t pitch, row_words;
    std::vector<std::ptrdiff_t> at;         // [steps]
    std::vector<std::int32_t> most;         // [kinds of rows][channels_out][out_width]
    std::vector<std::ptrdiff_t> kind;       // [out_height]: rows that have the same taps inside the image are of a kind
};

BinaryConv::BinaryConv(const BinarySpec& spec) : spec_(spec) {
    check(spec);
    words_ = binary_words(spec.channels_in);
    taps_ = spec.kernel[0] * spec.kernel[1];
    steps_ = taps_ * words_;
    const std::ptrdiff_t tap_bytes = (spec.channels_in + 7) / 8;
    auto* const to = static_cast<std::uint64_t*>(weights_.reserve(bytes_of(spec.channels_out * steps_)));
    signs_.assign(static_cast<std::size_t>(taps_ * spec.channels_out), static_cast<std::int32_t>(-spec.channels_in));
    for (std::ptrdiff_t k = 0; k < spec.channels_out; ++k)
        for (std::ptrdiff_t t = 0; t < taps_; ++t)
            for (std::ptrdiff_t w = 0; w < words_; ++w) {
                const std::uint64_t word = word_of(spec.bits + (k * taps_ + t) * tap_bytes, spec.channels_in, w);
                to[(k * taps_ + t) * words_ + w] = word;
                for (std::uint64_t left = word; left; left &= left - 1)
                    signs_[static_cast<std::size_t>(t * spec.channels_out + k)] += 2;
            }
    keep(scale_, spec.scale, spec.channels_out);
    keep(shift_, spec.shift, spec.channels_out);
    spec_.bits = nullptr;
    spec_.scale = spec_.shift = nullptr;
}

std::ptrdiff_t BinaryConv::out(int axis, std::ptrdiff_t size) const {
    const std::ptrdiff_t covered = (spec_.kernel[axis] - 1) * spec_.dilations[axis] + 1;
    const std::ptrdiff_t left = size + spec_.pads[axis] + spec_.pads[axis + 2] - covered;
    return left < 0 ? 0 : left / spec_.strides[axis] + 1;
}

std::shared_ptr<const BinaryConv::Map> BinaryConv::map_of(std::ptrdiff_t height, std::ptrdiff_t width) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (map_ && map_->height == height && map_->width == width) return map_;
    auto map = std::make_shared<Map>();
    map->height = height;
    map->width = width;
    map->out_height = out_height(height);
    map->out_width = out_width(width);
    if (height < 1 || width < 1 || map->out_height < 1 || map->out_width < 1)
        refuse("a map of " + std::to_string(height) + " x " + std::to_string(width) + " is smaller, padded, than the kernel");
    const std::ptrdiff_t stride = spec_.strides[1];
    map->rows = (map->out_height - 1) * spec_.strides[0] + (spec_.kernel[0] - 1) * spec_.dilations[0] + 1;
    map->columns = (map->out_width - 1) * stride + (spec_.kernel[1] - 1) * spec_.dilations[1] + 1;
    map->pitch = (map->columns + stride - 1) / stride;
    map->row_words = words_ * stride * map->pitch;
    for (std::ptrdiff_t i = 0; i < spec_.kernel[0]; ++i)
        for (std::ptrdiff_t j = 0; j < spec_.kernel[1]; ++j)
            for (std::ptrdiff_t w = 0; w < words_; ++w) {
                const std::ptrdiff_t column = j * spec_.dilations[1];
                map->at.push_back(i * spec_.dilations[0] * map->row_words +
                                  (w * stride + column % stride) * map->pitch + column / stride);
            }
    // a tap that lies outside meets words of 0, as if of -1 everywhere: what that gives is taken out again
    const auto outside = [&](int axis, std::ptrdiff_t at, std::ptrdiff_t tap, std::ptrdiff_t size) {
        const std::ptrdiff_t place = at * spec_.strides[axis] + tap * spec_.dilations[axis] - spec_.pads[axis];
        return place < 0 || place >= size;
    };
    std::vector<std::vector<bool>> kinds;
    for (std::ptrdiff_t row = 0; row < map->out_height; ++row) {
        std::vector<bool> beyond;
        for (std::ptrdiff_t i = 0; i < spec_.kernel[0]; ++i) beyond.push_back(outside(0, row, i, height));
        const auto known = std::find(kinds.begin(), kinds.end(), beyond);
        map->kind.push_back(known - kinds.begin());
        if (known == kinds.end()) kinds.push_back(std::move(beyond));
    }
    const auto all = static_cast<std::int32_t>(spec_.channels_in * taps_);
    map->most.assign(kinds.size() * static_cast<std::size_t>(spec_.channels_out * map->out_width), all);
    std::int32_t* most = map->most.data();
    for (const std::vector<bool>& beyond : kinds)
        for (std::ptrdiff_t k = 0; k < spec_.channels_out; ++k, most += map->out_width)
            for (std::ptrdiff_t t = 0; t < taps_; ++t) {
                const std::ptrdiff_t i = t / spec_.kernel[1], j = t % spec_.kernel[1];
                for (std::ptrdiff_t p = 0; p < map->out_width; ++p)
                    if (beyond[static_cast<std::size_t>(i)] || outside(1, p, j, width))
                        most[p] += signs_[static_cast<std::size_t>(t * spec_.channels_out + k)];
            }
    map_ = map;
    return map_;
}

void BinaryConv::pack_row(const Map& map, const float* image, std::ptrdiff_t row, std::uint64_t* to) const {
    const std::ptrdiff_t from = row - spec_.pads[0], left = spec_.pads[1], stride = spec_.strides[1];
    const std::ptrdiff_t read = std::min(map.width, map.columns - left);
    if (from < 0 || from >= map.height || read < map.columns || stride > 1)
        std::fill(to, to + map.row_words, std::uint64_t{0});
    if (from < 0 || from >= map.height || read <= 0) return;
    const BinaryKernels& kernels = binary_kernels(spec_.isa);
    const float* const x = image + from * map.width;
    const std::ptrdiff_t plane = map.height * map.width;
    if (stride == 1) return kernels.pack_planes({x, plane, spec_.channels_in, read, to + left, map.pitch});
    static thread_local std::vector<std::uint64_t> line;
    line.resize(static_cast<std::size_t>(words_ * read));
    kernels.pack_planes({x, plane, spec_.channels_in, read, line.data(), read});
    for (std::ptrdiff_t w = 0; w < words_; ++w)
        for (std::ptrdiff_t p = 0; p < read; ++p) {
            const std::ptrdiff_t column = p + left;
            to[(w * stride + column % stride) * map.pitch + column / stride] = line[static_cast<std::size_t>(w * read + p)];
        }
}

void BinaryConv::run(const float* x, std::ptrdiff_t batch, std::ptrdiff_t height, std::ptrdiff_t width, float* y, int parts,
                     const ParallelFor& parallel_for) const {
    if (batch < 1) return;
    const std::shared_ptr<const Map> found = map_of(height, width);
    const Map& map = *found;
    const std::ptrdiff_t image = map.rows * map.row_words;
    const Scratch::Taken scratch(scratch_, bytes_of(batch * image + binary_behind));
    std::uint64_t* const packed = scratch.as<std::uint64_t>();
    share(batch * map.rows, parts, parallel_for, [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
        for (std::ptrdiff_t i = begin; i < end; ++i)
            pack_row(map, x + i / map.rows * spec_.channels_in * height * width, i % map.rows, packed + i * map.row_words);
    });
    // so many output channels at a time that their weights stay in the first-level cache while the rows go by
    constexpr std::ptrdiff_t most_bytes = 16 << 10;
    const std::ptrdiff_t together = std::max<std::ptrdiff_t>(most_bytes / (steps_ * 8) / 8 * 8, 8);
    const std::ptrdiff_t blocks = (spec_.channels_out + together - 1) / together;
    const std::ptrdiff_t area = map.out_height * map.out_width;
    const BinaryKernels& kernels = binary_kernels(spec_.isa);
    share(batch * blocks * map.out_height, parts, parallel_for, [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
        for (std::ptrdiff_t i = begin; i < end; ++i) {
            const std::ptrdiff_t row = i % map.out_height, n = i / map.out_height / blocks;
            const std::ptrdiff_t first = i / map.out_height % blocks * together;
            const std::ptrdiff_t kind = map.kind[static_cast<std::size_t>(row)];
            kernels.convolve({weights_.as<std::uint64_t>() + first * steps_,
                              packed + n * image + row * spec_.strides[0] * map.row_words, map.at.data(), steps_,
                              map.most.data() + (kind * spec_.channels_out + first) * map.out_width,
                              scale_.as<float>() + first, shift_.as<float>() + first,
                              y + (n * spec_.channels_out + first) * area + row * map.out_width, area,
                              std::min(together, spec_.channels_out - first), map.out_width});
        }
    });
}

// -- linear layers -----------------------------------------------------------------------------------------------------

BinaryDense::BinaryDense(const BinarySpec& spec) : spec_(spec), words_(binary_words(spec.channels_in)) {
    check(spec);
    if (spec.kernel[0] != 1 || spec.kernel[1] != 1) refuse("a linear layer has a kernel of 1 x 1");
    const std::ptrdiff_t blocks = (spec.channels_out + binary_lanes - 1) / binary_lanes;
    auto* const to = static_cast<std::uint64_t*>(weights_.reserve(bytes_of(blocks * words_ * binary_lanes)));
    for (std::ptrdiff_t k = 0; k < spec.channels_out; ++k)
        for (std::ptrdiff_t w = 0; w < words_; ++w)
            to[(k / binary_lanes * words_ + w) * binary_lanes + k % binary_lanes] =
                word_of(spec.bits + k * ((spec.channels_in + 7) / 8), spec.channels_in, w);
    keep(scale_, spec.scale, spec.channels_out);
    keep(shift_, spec.shift, spec.channels_out);
    spec_.bits = nullptr;
    spec_.scale = spec_.shift = nullptr;
}

void BinaryDense::run(const float* x, std::ptrdiff_t rows, float* y, int parts, const ParallelFor& parallel_for) const {
    if (rows < 1) return;
    constexpr std::ptrdiff_t together = 32;  // rows whose sums stay in a cache until they are finished
    const Scratch::Taken scratch(scratch_, bytes_of(rows * words_));
    std::uint64_t* const packed = scratch.as<std::uint64_t>();
    const BinaryKernels& kernels = binary_kernels(spec_.isa);
    const std::ptrdiff_t columns = spec_.channels_out, blocks = (columns + binary_lanes - 1) / binary_lanes;
    const auto multiply = [&](std::ptrdiff_t row, std::ptrdiff_t many, std::ptrdiff_t block, std::ptrdiff_t end) {
        const std::ptrdiff_t first = block * binary_lanes, count = std::min(end * binary_lanes, columns) - first;
        float* const to = y + row * columns + first;
        // the sums stand where what they stand for will
        kernels.multiply({packed + row * words_, weights_.as<std::uint64_t>() + first * words_,
                          reinterpret_cast<std::int32_t*>(to), many, count, words_,
                          static_cast<std::int32_t>(spec_.channels_in), columns});
        kernels.finish(to, many, count, columns, scale_.as<float>() + first, shift_.as<float>() + first);
    };
    const auto pack = [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
        kernels.pack_rows(x + begin * spec_.channels_in, end - begin, spec_.channels_in, packed + begin * words_);
    };
    if (rows >= 4 * parts)
        return share(rows, parts, parallel_for, [&](std::ptrdiff_t begin, std::ptrdiff_t end) {
            for (; begin < end; begin += together) {
                const std::ptrdiff_t many = std::min(together, end - begin);
                pack(begin, begin + many);
                multiply(begin, many, 0, blocks);
            }
        });
    pack(0, rows);
    share(blocks, parts, parallel_for, [&](std::ptrdiff_t begin, std::ptrdiff_t end) { multiply(0, rows, begin, end); });
}

}  // namespace bitsmith
