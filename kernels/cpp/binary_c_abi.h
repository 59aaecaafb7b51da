/* Products of values of one bit, for ctypes: the structures of cpp/binary.h. Thread-safe. */
#pragma once

#include <stdint.h>

#include "c_abi.h"

#if defined(__cplusplus)
extern "C" {
#endif

typedef struct {
    const uint64_t* a; /* [rows][words] */
    const uint64_t* b; /* [blocks of 8 columns][words][8] */
    int32_t* y;        /* [rows][columns] */
    int64_t rows, columns, words;
    int32_t length, threads;
    const char* isa;   /* a name, or NULL for the best */
} bitsmith_binary;

/* Names of what this CPU has, best first, separated by commas. */
BITSMITH_KERNELS_API const char* bitsmith_binary_isas(void);

/* 0, or 1 for an isa that is not there, or 2 on anything else. */
BITSMITH_KERNELS_API int32_t bitsmith_binary_multiply(const bitsmith_binary* product);

#if defined(__cplusplus)
}
#endif
