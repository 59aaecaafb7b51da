// Sums to what they stand for, in their own memory. In each translation unit, so that each has it in its instructions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace bitsmith {

namespace {

inline void finish(void* y, std::ptrdiff_t rows, std::ptrdiff_t columns, std::ptrdiff_t pitch, const float* scale,
                   const float* shift) {
    for (std::ptrdiff_t i = 0; i < rows; ++i) {
        char* const row = static_cast<char*>(y) + i * pitch * 4;
        for (std::ptrdiff_t j = 0; j < columns; ++j) {
            std::int32_t sum;
            std::memcpy(&sum, row + j * 4, 4);
            const float value = static_cast<float>(sum) * scale[j] + shift[j];
            std::memcpy(row + j * 4, &value, 4);
        }
    }
}

}  // namespace

}  // namespace bitsmith
