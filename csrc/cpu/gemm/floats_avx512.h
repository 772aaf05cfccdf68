// What float_decode.h asks of an instruction set, with AVX-512.
#pragma once

#include "isa/avx512.h"
#include "nf4/avx512.h"

namespace lora_ops {
namespace {

struct Avx512Floats {
    using F = __m512;
    using Codec = Avx512NF4;
    static constexpr int kLanes = 16, kRows = 6, kVectors = 4;  // 24 accumulators, 4 + 1 operands of 32 registers
    static constexpr bool kGroups = false;

    template <class T>
    static Avx512NF4::Table<float> table(float absmax) {
        Avx512NF4::Table<float> table(absmax);
        if constexpr (sizeof(T) == 2) table.value = widen(to_16_bits(table.value, T{}), T{});
        return table;
    }
    static F zero() { return _mm512_setzero_ps(); }
    static F set1(float x) { return _mm512_set1_ps(x); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static float sum(F a) { return _mm512_reduce_add_ps(a); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    template <class T>
    static F load(const T* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{}); }
    template <class T>
    static void store(T* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_16_bits(x, T{})); }

    // Columns [at, at + 16) of 16 rows -> rows of out.
    static void transpose(const float* const rows[16], int64_t at, float* out, int64_t stride) {
        __m512i r[16];
        for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i] + at);
        transpose16(r);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * stride, r[i]);
    }
};

}  // namespace
}  // namespace lora_ops
