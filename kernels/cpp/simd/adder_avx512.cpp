#include <immintrin.h>

#include "adder_tile.h"

namespace bitsmith {

namespace {

struct Vector {
    using T = __m512;
    static constexpr int lanes = 16, filters = 8, values = 4;
    static T load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, T x) { _mm512_storeu_ps(p, x); }
    static T all(float x) { return _mm512_set1_ps(x); }
    static T add(T a, T b) { return _mm512_add_ps(a, b); }
    static T sub(T a, T b) { return _mm512_sub_ps(a, b); }
    static T fma(T a, T b, T c) { return _mm512_fmadd_ps(a, b, c); }
    static T size(T x) { return _mm512_abs_ps(x); }
    // of a NaN and a number both give their second operand
    static T between(T x) { return _mm512_max_ps(all(-1.0f), _mm512_min_ps(all(1.0f), x)); }
};

}  // namespace

const AdderKernel* adder_avx512() { return kernel_of<Vector>(); }

}  // namespace bitsmith
