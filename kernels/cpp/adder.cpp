#include "adder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "buffer.h"
#include "simd/adder_tile.h"

namespace bitsmith {

#ifndef BITSMITH_ADDER_AVX512
const AdderKernel* adder_avx512() { return nullptr; }
#endif
#ifndef BITSMITH_ADDER_AVX2
const AdderKernel* adder_avx2() { return nullptr; }
#endif

namespace {

struct Scalar {
    using T = float;
    static constexpr int lanes = 1, filters = 4, values = 2;
    static T load(const float* p) { return *p; }
    static void store(float* p, T x) { *p = x; }
    static T all(float x) { return x; }
    static T add(T a, T b) { return a + b; }
    static T sub(T a, T b) { return a - b; }
    static T fma(T a, T b, T c) { return std::fma(a, b, c); }
    static T size(T x) { return std::fabs(x); }
    static T between(T x) { return x < -1.0f ? -1.0f : x > 1.0f ? 1.0f : x; }
};

// Neighbouring outputs of one line of one image: row `row` of a tile on.
struct Run {
    std::ptrdiff_t row, count, image, y, x;
};

// The runs of outputs [begin, begin + count); how many there are.
int runs_of(const AdderShape& s, std::ptrdiff_t begin, std::ptrdiff_t count, Run* runs) {
    int found = 0;
    for (std::ptrdiff_t row = 0; row < count;) {
        const std::ptrdiff_t output = begin + row, place = output % s.places();
        const std::ptrdiff_t x = place % s.out[1];
        const std::ptrdiff_t here = std::min(count - row, s.out[1] - x);
        runs[found++] = {row, here, output / s.places(), place / s.out[1], x};
        row += here;
    }
    return found;
}

// Calls f(pixels of the input, row of the tile, how many) for value k of the patches of a run, zeros left out.
template <class F>
void along(const AdderShape& s, const Run& run, std::ptrdiff_t channel, std::ptrdiff_t ky, std::ptrdiff_t kx, F f) {
    const std::ptrdiff_t y = run.y * s.stride[0] - s.top + ky * s.dilation[0];
    if (y < 0 || y >= s.height) return;
    const std::ptrdiff_t x = run.x * s.stride[1] - s.left + kx * s.dilation[1], step = s.stride[1];
    const std::ptrdiff_t skip = x < 0 ? (-x + step - 1) / step : 0;
    const std::ptrdiff_t room = x < s.width ? (s.width - 1 - x) / step + 1 : 0;
    const std::ptrdiff_t end = std::min(run.count, room);
    if (skip >= end) return;
    f(((run.image * s.channels + channel) * s.height + y) * s.width + x + skip * step, run.row + skip, end - skip);
}

template <class F>
void every_value(const AdderShape& s, std::ptrdiff_t group, const Run* runs, int count, F f) {
    const std::ptrdiff_t each = s.channels / s.groups;
    std::ptrdiff_t k = 0;
    for (std::ptrdiff_t c = group * each; c < (group + 1) * each; ++c)
        for (std::ptrdiff_t ky = 0; ky < s.kernel[0]; ++ky)
            for (std::ptrdiff_t kx = 0; kx < s.kernel[1]; ++kx, ++k)
                for (int r = 0; r < count; ++r)
                    along(s, runs[r], c, ky, kx, [&](std::ptrdiff_t pixel, std::ptrdiff_t row, std::ptrdiff_t length) {
                        f(k * adder_rows + row, pixel, length);
                    });
}

void gather(const AdderShape& s, std::ptrdiff_t group, const Run* runs, int count, const float* x, float* tile) {
    std::memset(tile, 0, sizeof(float) * s.values() * adder_rows);
    const std::ptrdiff_t step = s.stride[1];
    every_value(s, group, runs, count, [&](std::ptrdiff_t to, std::ptrdiff_t from, std::ptrdiff_t length) {
        for (std::ptrdiff_t i = 0; i < length; ++i) tile[to + i] = x[from + i * step];
    });
}

}  // namespace

const AdderKernel* adder_reference() { return kernel_of<Scalar>(); }

const AdderKernel* adder_kernel(AdderIsa isa) {
    switch (isa) {
        case AdderIsa::avx512: return adder_avx512();
        case AdderIsa::avx2: return adder_avx2();
        default: return adder_reference();
    }
}

const char* name_of(AdderIsa isa) {
    switch (isa) {
        case AdderIsa::avx512: return "avx512";
        case AdderIsa::avx2: return "avx2";
        default: return "reference";
    }
}

bool available(AdderIsa isa) {
    if (!adder_kernel(isa)) return false;
#if defined(__x86_64__)
    switch (isa) {
        case AdderIsa::avx512: return __builtin_cpu_supports("avx512f");
        case AdderIsa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        default: return true;
    }
#else
    return isa == AdderIsa::reference;
#endif
}

void adder_forward(const AdderShape& s, const float* x, const float* w, float* y, std::ptrdiff_t begin,
                   std::ptrdiff_t end, const AdderKernel& kernel) {
    const std::ptrdiff_t filters = s.filters / s.groups;
    Buffer memory(sizeof(float) * adder_rows * (s.values() + filters));
    float* tile = memory.as<float>();
    float* made = tile + adder_rows * s.values();
    Run runs[adder_rows];
    for (std::ptrdiff_t first = begin; first < end; first += adder_rows) {
        const int count = runs_of(s, first, std::min(adder_rows, end - first), runs);
        for (std::ptrdiff_t group = 0; group < s.groups; ++group) {
            gather(s, group, runs, count, x, tile);
            kernel.distances(tile, w + group * filters * s.values(), made, s.values(), filters);
            for (int r = 0; r < count; ++r)
                for (std::ptrdiff_t f = 0; f < filters; ++f)
                    std::memcpy(y + (runs[r].image * s.filters + group * filters + f) * s.places() +
                                    runs[r].y * s.out[1] + runs[r].x,
                                made + f * adder_rows + runs[r].row, sizeof(float) * runs[r].count);
        }
    }
}

void adder_input_gradient(const AdderShape& s, const float* x, const float* w, const float* g, float* gx,
                          std::ptrdiff_t begin, std::ptrdiff_t end, const AdderKernel& kernel) {
    const std::ptrdiff_t filters = s.filters / s.groups, step = s.stride[1];
    Buffer memory(sizeof(float) * adder_rows * (s.values() + filters));
    float* tile = memory.as<float>();
    float* behind = tile + adder_rows * s.values();
    const std::ptrdiff_t pixels = s.channels * s.height * s.width;
    std::memset(gx + begin * pixels, 0, sizeof(float) * (end - begin) * pixels);
    Run runs[adder_rows];
    // A tile has outputs of one image, or of whole ones: what is added to a pixel, and in which order, does not depend on
    // where the threads' shares begin.
    const std::ptrdiff_t places = s.places(), last = end * places;
    for (std::ptrdiff_t first = begin * places, next; first < last; first = next) {
        next = places < adder_rows ? std::min(first + adder_rows / places * places, last)
                                   : std::min(first + adder_rows, (first / places + 1) * places);
        const int count = runs_of(s, first, next - first, runs);
        for (std::ptrdiff_t group = 0; group < s.groups; ++group) {
            gather(s, group, runs, count, x, tile);
            std::memset(behind, 0, sizeof(float) * filters * adder_rows);
            for (int r = 0; r < count; ++r)
                for (std::ptrdiff_t f = 0; f < filters; ++f)
                    std::memcpy(behind + f * adder_rows + runs[r].row,
                                g + (runs[r].image * s.filters + group * filters + f) * s.places() +
                                    runs[r].y * s.out[1] + runs[r].x,
                                sizeof(float) * runs[r].count);
            kernel.pulls(tile, w + group * filters * s.values(), behind, s.values(), filters);
            every_value(s, group, runs, count, [&](std::ptrdiff_t from, std::ptrdiff_t to, std::ptrdiff_t length) {
                for (std::ptrdiff_t i = 0; i < length; ++i) gx[to + i * step] += tile[from + i];
            });
        }
    }
}

}  // namespace bitsmith
