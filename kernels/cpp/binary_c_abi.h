/* Products and layers of values of one bit, for ctypes: the structures of cpp/binary.h and cpp/binary_layer.h.
   Thread-safe. */
#pragma once

#include <stdint.h>

#include "c_abi.h"

#if defined(__cplusplus)
extern "C" {
#endif

typedef struct bitsmith_binary_conv bitsmith_binary_conv;

typedef struct {
    const uint64_t* a; /* [rows][words] */
    const uint64_t* b; /* [blocks of 8 columns][words][8] */
    int32_t* y;        /* [rows][columns] */
    int64_t rows, columns, words;
    int32_t length, threads;
    const char* isa;   /* a name, or NULL for the best */
} bitsmith_binary;

typedef struct {
    int64_t channels_in, channels_out;
    int64_t kernel[2], strides[2], dilations[2];
    int64_t pads[4];      /* top, left, bottom, right */
    const uint8_t* bits;  /* [channels_out][taps][(channels_in + 7) / 8] */
    const float* scale;   /* [channels_out] */
    const float* shift;   /* [channels_out] */
    const char* isa;      /* a name, or NULL for the best */
} bitsmith_binary_spec;

/* Names of what this CPU has, best first, separated by commas. */
BITSMITH_KERNELS_API const char* bitsmith_binary_isas(void);

/* 0, or 1 for an isa that is not there, or 2 on anything else. */
BITSMITH_KERNELS_API int32_t bitsmith_binary_multiply(const bitsmith_binary* product);

/* NULL on failure: bitsmith_error() has the message. */
BITSMITH_KERNELS_API bitsmith_binary_conv* bitsmith_binary_conv_new(const bitsmith_binary_spec* spec);
BITSMITH_KERNELS_API void bitsmith_binary_conv_free(bitsmith_binary_conv* layer);
BITSMITH_KERNELS_API const char* bitsmith_binary_conv_isa(const bitsmith_binary_conv* layer);

/* x [batch][channels_in][height][width] -> y [batch][channels_out][out_height][out_width]. 0, or 1 on wrong input, or 2 on
   anything else. */
BITSMITH_KERNELS_API int32_t bitsmith_binary_conv_run(const bitsmith_binary_conv* layer, const float* x, int64_t batch,
                                                      int64_t height, int64_t width, float* y, int32_t threads);

#if defined(__cplusplus)
}
#endif
