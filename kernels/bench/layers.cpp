// CPU time of a layer in a chain of ten with distinct weights, so that weights come from where they would in a network.
// Usage: layers [isa [tile bits [channels map]]]; see README.md for the build.
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "layer.h"
#include "peak.h"

namespace {

using namespace bitsmith;

double cpu_seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

struct Chain {
    int channels, map;
    std::vector<std::unique_ptr<Layer>> layers;
    Buffer images[2];

    Chain(Isa isa, int tile, int bits, int channels, int map) : channels(channels), map(map) {
        const int taps = (tile + 2) * (tile + 2);
        const std::size_t weights = static_cast<std::size_t>(taps) * channels * channels;
        std::mt19937 random(1);
        std::vector<std::int8_t> u8(weights);
        std::vector<std::int16_t> u16(weights);
        const std::int16_t factor = tile == 2 ? 4096 : 1024;
        std::vector<std::int16_t> mul(static_cast<std::size_t>(taps) * channels, factor);
        std::vector<float> us(static_cast<std::size_t>(taps) * channels, 1e-3f), bias(channels, 20.f);
        for (int n = 0; n < 10; ++n) {
            for (auto& w : u8) w = static_cast<std::int8_t>(static_cast<int>(random() % 255) - 127);
            for (auto& w : u16) w = static_cast<std::int16_t>(static_cast<int>(random() % 511) - 255);
            Spec spec;
            spec.tile = tile;
            spec.bits = bits;
            spec.channels_in = spec.channels_out = channels;
            spec.u = bits == 8 ? static_cast<const void*>(u8.data()) : u16.data();
            spec.mul = mul.data();
            spec.us = us.data();
            spec.bias = bias.data();
            spec.isa = isa;
            layers.push_back(std::make_unique<Layer>(spec));
        }
        for (Buffer& image : images) {
            image.reserve(static_cast<std::size_t>(map) * map * channels);
            std::uint8_t* const levels = image.as<std::uint8_t>();
            for (std::size_t i = 0; i < image.size(); ++i) levels[i] = static_cast<std::uint8_t>(random());
        }
    }

    double seconds_of_a_layer() {
        Call call;
        call.height = call.width = map;
        call.relu = true;
        const double begin = cpu_seconds();
        for (std::size_t n = 0; n < layers.size(); ++n) {
            call.x = images[n % 2].as<void>();
            call.y = images[1 - n % 2].as<void>();
            layers[n]->run(call, nullptr);
        }
        return (cpu_seconds() - begin) / static_cast<double>(layers.size());
    }
};

void report(Isa isa, int tile, int bits, int channels, int map, double peak) {
    Chain chain(isa, tile, bits, channels, map);
    std::vector<double> times;
    for (int round = 0; round < 20; ++round) chain.seconds_of_a_layer();
    for (int round = 0; round < 301; ++round) times.push_back(chain.seconds_of_a_layer());
    std::sort(times.begin(), times.end());
    const double median = times[times.size() / 2];
    const double direct = 9.0 * map * map * channels * channels;
    const int tiles = (map + tile - 1) / tile;
    const double done = static_cast<double>((tile + 2) * (tile + 2)) * tiles * tiles * channels * channels;
    std::printf("F(%d,3) %2d bits %4d @ %2d  median %.4f ms  best %.4f  p90 %.4f   direct-equivalent %6.0f GMAC/s"
                "   done %5.0f = %3.0f %% of the peak\n",
                tile, bits, channels, map, median * 1e3, times[0] * 1e3, times[times.size() * 9 / 10] * 1e3,
                direct / median * 1e-9, done / median * 1e-9, done / median / peak * 100);
}

}  // namespace

int main(int count, char** words) {
    Isa isa = available_isas().front();
    for (const Isa other : available_isas())
        if (count > 1 && !std::strcmp(words[1], name_of(other))) isa = other;
    const double bytes = peak_of(isa, 8), words16 = peak_of(isa, 16);
    std::printf("%s, 1 thread; peak of the dot product, in registers: 8 bits %.0f, 16 bits %.0f GMAC/s\n", name_of(isa),
                bytes * 1e-9, words16 * 1e-9);
    const int maps[][2] = {{64, 56}, {128, 28}, {256, 14}, {512, 7}};
    for (const auto& [tile, bits] : {std::pair{2, 8}, std::pair{4, 8}, std::pair{4, 16}, std::pair{2, 16}}) {
        if (count > 3 && (std::atoi(words[2]) != tile || std::atoi(words[3]) != bits)) continue;
        if (count > 5)
            report(isa, tile, bits, std::atoi(words[4]), std::atoi(words[5]), bits == 8 ? bytes : words16);
        else
            for (const auto& map : maps) report(isa, tile, bits, map[0], map[1], bits == 8 ? bytes : words16);
    }
}
