/* Adder layers for ctypes: the structures of cpp/adder.h. Thread-safe. */
#pragma once

#include <stdint.h>

#include "c_abi.h"

#if defined(__cplusplus)
extern "C" {
#endif

typedef struct {
    const float* x; /* [images][channels][height][width] */
    const float* w; /* [filters][channels / groups][kernel][kernel] */
    const float* g; /* [images][filters][out][out], or NULL for the forward pass */
    float* y;       /* like g, or of the gradient like x */
    int64_t images, channels, height, width, filters, groups;
    int64_t kernel[2], stride[2], dilation[2];
    int64_t top, left, out[2];
    int32_t threads;
    const char* isa; /* a name, or NULL for the best */
} bitsmith_adder;

/* Names of what this CPU has, best first, separated by commas. */
BITSMITH_KERNELS_API const char* bitsmith_adder_isas(void);

/* The outputs, or with g the gradient by the input. 0, or 1 for an isa that is not there, or 2 on anything else. */
BITSMITH_KERNELS_API int32_t bitsmith_adder_run(const bitsmith_adder* layer);

#if defined(__cplusplus)
}
#endif
