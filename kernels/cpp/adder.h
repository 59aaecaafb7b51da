// Adder layers in float: negative L1 distances of patches to filters, and the gradient by the input.
#pragma once

#include <cstddef>

namespace bitsmith {

constexpr std::ptrdiff_t adder_rows = 32;  // outputs that are computed together

enum class AdderIsa { avx512, avx2, reference };

const char* name_of(AdderIsa isa);

// True where both this CPU (and its operating system) and this build have it.
bool available(AdderIsa isa);

// A convolution's geometry. A linear layer has maps of one pixel.
struct AdderShape {
    std::ptrdiff_t images, channels, height, width;  // of the input
    std::ptrdiff_t filters, groups;
    std::ptrdiff_t kernel[2], stride[2], dilation[2];
    std::ptrdiff_t top, left;       // zeros before the first pixel
    std::ptrdiff_t out[2];          // height and width of the output

    std::ptrdiff_t values() const { return channels / groups * kernel[0] * kernel[1]; }  // of a patch
    std::ptrdiff_t places() const { return out[0] * out[1]; }
};

// Every instruction set does the same additions in the same order: the results are the same bits.
struct AdderKernel {
    // y[f * ldy + r] = -sum over k of |x[k * adder_rows + r] - w[f * values + k]|, for all rows r of a tile.
    void (*distances)(const float* x, const float* w, float* y, std::ptrdiff_t values, std::ptrdiff_t filters);
    // x[k][r] = sum over f of g[f][r] * clamp(w[f][k] - x[k][r], -1, 1); NaN stays NaN.
    void (*pulls)(float* x, const float* w, const float* g, std::ptrdiff_t values, std::ptrdiff_t filters);
};

// Null where the library was built without it.
const AdderKernel* adder_avx512();
const AdderKernel* adder_avx2();
const AdderKernel* adder_reference();
const AdderKernel* adder_kernel(AdderIsa isa);

// Outputs [begin, end) of images * places, all filters: y[image][filter][place].
void adder_forward(const AdderShape& shape, const float* x, const float* w, float* y, std::ptrdiff_t begin,
                   std::ptrdiff_t end, const AdderKernel& kernel);

// Of images [begin, end): gx[image][channel][pixel] from g[image][filter][place].
void adder_input_gradient(const AdderShape& shape, const float* x, const float* w, const float* g, float* gx,
                          std::ptrdiff_t begin, std::ptrdiff_t end, const AdderKernel& kernel);

}  // namespace bitsmith
