/* The shared library's interface, for ctypes. Every function is thread-safe. */
#pragma once

#include <stdint.h>

#if defined(__cplusplus)
extern "C" {
#endif

#define BITSMITH_KERNELS_API __attribute__((visibility("default")))

typedef struct bitsmith_layer bitsmith_layer;

typedef struct {
    int32_t tile, bits;
    int64_t channels_in, channels_out;
    const void* u;      /* int8 or int16 [taps][channels_out][channels_in] */
    const int16_t* mul; /* [taps][channels_in] */
    const int16_t* offset; /* [channels_in] or NULL */
    const float* us;    /* [taps][channels_out] */
    const float* bias;  /* [channels_out] or NULL */
    int32_t x_zero, x_signed;
    int32_t pads[4];    /* top, left, bottom, right */
    const char* isa;    /* a name, or NULL for the best */
} bitsmith_spec;

typedef struct {
    float scale;
    int32_t zero, is_signed;
} bitsmith_levels;

typedef struct {
    const void* x;
    int64_t batch, height, width;
    void* y;
    bitsmith_levels y_levels;
    int32_t low, high, relu;
    const void* residual; /* or NULL */
    bitsmith_levels residual_levels;
    int32_t threads;
} bitsmith_call;

/* Of this interface: another number is another layout of the structures above. */
BITSMITH_KERNELS_API int32_t bitsmith_abi(void);

/* Names of what this CPU has, best first, separated by commas. */
BITSMITH_KERNELS_API const char* bitsmith_isas(void);

/* The message of the last failure on this thread. */
BITSMITH_KERNELS_API const char* bitsmith_error(void);

/* NULL on failure. */
BITSMITH_KERNELS_API bitsmith_layer* bitsmith_layer_new(const bitsmith_spec* spec);
BITSMITH_KERNELS_API void bitsmith_layer_free(bitsmith_layer* layer);
BITSMITH_KERNELS_API int64_t bitsmith_layer_bytes(const bitsmith_layer* layer);
BITSMITH_KERNELS_API const char* bitsmith_layer_isa(const bitsmith_layer* layer);

/* 0, or 1 on wrong input, or 2 on anything else. */
BITSMITH_KERNELS_API int32_t bitsmith_layer_run(const bitsmith_layer* layer, const bitsmith_call* call);

/* For benchmarks. Multiply-adds of the products alone of a few tiles, done `rounds` times; multiply-adds a second of the dot
   product in registers, 0 for the reference and on an unknown isa (NULL: the best); the compiler. */
BITSMITH_KERNELS_API int64_t bitsmith_layer_multiply(const bitsmith_layer* layer, int32_t rounds);
BITSMITH_KERNELS_API double bitsmith_peak(const char* isa, int32_t bits);
BITSMITH_KERNELS_API const char* bitsmith_compiler(void);

#if defined(__cplusplus)
}
#endif
