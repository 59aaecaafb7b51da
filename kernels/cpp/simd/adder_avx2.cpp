#include <immintrin.h>

#include "adder_tile.h"

namespace bitsmith {

namespace {

struct Vector {
    using T = __m256;
    static constexpr int lanes = 8, filters = 4, values = 2;
    static T load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, T x) { _mm256_storeu_ps(p, x); }
    static T all(float x) { return _mm256_set1_ps(x); }
    static T add(T a, T b) { return _mm256_add_ps(a, b); }
    static T sub(T a, T b) { return _mm256_sub_ps(a, b); }
    static T fma(T a, T b, T c) { return _mm256_fmadd_ps(a, b, c); }
    static T size(T x) { return _mm256_andnot_ps(all(-0.0f), x); }
    // of a NaN and a number both give their second operand
    static T between(T x) { return _mm256_max_ps(all(-1.0f), _mm256_min_ps(all(1.0f), x)); }
};

}  // namespace

const AdderKernel* adder_avx2() { return kernel_of<Vector>(); }

}  // namespace bitsmith
