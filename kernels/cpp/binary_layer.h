// Layers whose weights and inputs are signs: packed once, run on floats, which they take the signs of.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "binary.h"
#include "buffer.h"
#include "parallel.h"

namespace bitsmith {

// y = float32(sum of products of signs) * scale + shift, each operation rounded once; the signs of a value that a
// convolution pads with are 0. The arrays are read while a layer is made and not kept.
struct BinarySpec {
    std::ptrdiff_t channels_in = 0, channels_out = 0;
    std::ptrdiff_t kernel[2] = {1, 1}, strides[2] = {1, 1}, dilations[2] = {1, 1};  // by height and width
    std::ptrdiff_t pads[4] = {0, 0, 0, 0};  // top, left, bottom, right
    const std::uint8_t* bits = nullptr;     // [channels_out][taps][(channels_in + 7) / 8], the lowest bit first; 1 is +1
    const float* scale = nullptr;           // [channels_out]
    const float* shift = nullptr;           // [channels_out]
    BinaryIsa isa = BinaryIsa::reference;
};

// Throws std::invalid_argument, with the reason.
void check(const BinarySpec& spec);

// Memory that calls, of several threads perhaps, take in turn: a thread that waits inside a call may begin another.
class Scratch {
public:
    class Taken {
    public:
        Taken(Scratch& owner, std::size_t bytes);
        ~Taken();
        Taken(const Taken&) = delete;
        Taken& operator=(const Taken&) = delete;
        template <class T>
        T* as() const {
            return buffer_->as<T>();
        }

    private:
        Scratch& owner_;
        std::unique_ptr<Buffer> buffer_;
    };

private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<Buffer>> free_;
};

class BinaryConv {
public:
    explicit BinaryConv(const BinarySpec& spec);

    // x [batch][channels_in][height][width] -> y [batch][channels_out][out_height][out_width]. Thread-safe. Throws
    // std::invalid_argument where the padded map is smaller than the kernel.
    void run(const float* x, std::ptrdiff_t batch, std::ptrdiff_t height, std::ptrdiff_t width, float* y, int parts,
             const ParallelFor& parallel_for) const;

    std::ptrdiff_t out_height(std::ptrdiff_t height) const { return out(0, height); }
    std::ptrdiff_t out_width(std::ptrdiff_t width) const { return out(1, width); }
    BinaryIsa isa() const { return spec_.isa; }
    std::size_t packed_bytes() const { return weights_.size(); }

private:
    struct Map;

    std::ptrdiff_t out(int axis, std::ptrdiff_t size) const;
    std::shared_ptr<const Map> map_of(std::ptrdiff_t height, std::ptrdiff_t width) const;
    void pack_row(const Map& map, const float* image, std::ptrdiff_t row, std::uint64_t* to) const;

    BinarySpec spec_;                      // without its arrays
    std::ptrdiff_t words_, taps_, steps_;
    Buffer weights_, scale_, shift_;       // weights: [channels_out][taps][words]
    std::vector<std::int32_t> signs_;      // [taps][channels_out]: the sum of a tap's signs
    mutable std::mutex mutex_;
    mutable std::shared_ptr<const Map> map_;
    mutable Scratch scratch_;
};

class BinaryDense {
public:
    explicit BinaryDense(const BinarySpec& spec);

    // x [rows][channels_in] -> y [rows][channels_out]. Thread-safe.
    void run(const float* x, std::ptrdiff_t rows, float* y, int parts, const ParallelFor& parallel_for) const;

    BinaryIsa isa() const { return spec_.isa; }
    std::size_t packed_bytes() const { return weights_.size(); }

private:
    BinarySpec spec_;
    std::ptrdiff_t words_;
    Buffer weights_, scale_, shift_;       // weights: [blocks][words][lanes]
    mutable Scratch scratch_;
};

}  // namespace bitsmith
