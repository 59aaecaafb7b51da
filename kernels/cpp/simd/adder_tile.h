// One tile of an adder layer for any vector V: some floats, with load, store, all, sub, add, size (magnitude), between
// (clamp to [-1, 1], NaN kept) and fma.
#pragma once

#include "adder.h"

namespace bitsmith {
namespace {

template <class V, int filters>
void distances_of(const float* x, const float* w, float* y, std::ptrdiff_t values) {
    constexpr int vectors = adder_rows / V::lanes;
    constexpr int together = vectors < 2 ? vectors : 2;  // what the registers hold beside the filters
    for (int first = 0; first < vectors; first += together) {
        typename V::T sums[filters][together];
        for (int f = 0; f < filters; ++f)
            for (int v = 0; v < together; ++v) sums[f][v] = V::all(0.0f);
        for (std::ptrdiff_t k = 0; k < values; ++k) {
            typename V::T seen[together];
            for (int v = 0; v < together; ++v) seen[v] = V::load(x + k * adder_rows + (first + v) * V::lanes);
            for (int f = 0; f < filters; ++f) {
                const typename V::T weight = V::all(w[f * values + k]);
                for (int v = 0; v < together; ++v) sums[f][v] = V::add(sums[f][v], V::size(V::sub(seen[v], weight)));
            }
        }
        for (int f = 0; f < filters; ++f)
            for (int v = 0; v < together; ++v)
                V::store(y + f * adder_rows + (first + v) * V::lanes, V::sub(V::all(-0.0f), sums[f][v]));
    }
}

template <class V>
void distances(const float* x, const float* w, float* y, std::ptrdiff_t values, std::ptrdiff_t filters) {
    constexpr int most = V::filters;
    std::ptrdiff_t f = 0;
    for (; f + most <= filters; f += most) distances_of<V, most>(x, w + f * values, y + f * adder_rows, values);
    for (; f < filters; ++f) distances_of<V, 1>(x, w + f * values, y + f * adder_rows, values);
}

template <class V, int count>
void pulls_of(float* x, const float* w, const float* g, std::ptrdiff_t values, std::ptrdiff_t filters) {
    constexpr int vectors = adder_rows / V::lanes;
    constexpr int together = vectors < 2 ? vectors : 2;
    for (int first = 0; first < vectors; first += together) {
        typename V::T seen[count][together], sums[count][together];
        for (int k = 0; k < count; ++k)
            for (int v = 0; v < together; ++v) {
                seen[k][v] = V::load(x + k * adder_rows + (first + v) * V::lanes);
                sums[k][v] = V::all(0.0f);
            }
        for (std::ptrdiff_t f = 0; f < filters; ++f) {
            typename V::T behind[together];
            for (int v = 0; v < together; ++v) behind[v] = V::load(g + f * adder_rows + (first + v) * V::lanes);
            for (int k = 0; k < count; ++k) {
                const typename V::T weight = V::all(w[f * values + k]);
                for (int v = 0; v < together; ++v)
                    sums[k][v] = V::fma(behind[v], V::between(V::sub(weight, seen[k][v])), sums[k][v]);
            }
        }
        for (int k = 0; k < count; ++k)
            for (int v = 0; v < together; ++v)
                V::store(x + k * adder_rows + (first + v) * V::lanes, sums[k][v]);
    }
}

template <class V>
void pulls(float* x, const float* w, const float* g, std::ptrdiff_t values, std::ptrdiff_t filters) {
    constexpr int most = V::values;
    std::ptrdiff_t k = 0;
    for (; k + most <= values; k += most) pulls_of<V, most>(x + k * adder_rows, w + k, g, values, filters);
    for (; k < values; ++k) pulls_of<V, 1>(x + k * adder_rows, w + k, g, values, filters);
}

template <class V>
const AdderKernel* kernel_of() {
    static const AdderKernel kernel = {distances<V>, pulls<V>};
    return &kernel;
}

}  // namespace
}  // namespace bitsmith
