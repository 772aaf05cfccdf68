// What the passes ask of an instruction set, with AVX-512: products of floats, and packing from every dtype.
#pragma once

#include <string.h>

#include "isa/avx512.h"
#include "lora/entry.h"
#include "philox/avx512.h"

namespace lora_ops {
namespace {

inline __mmask16 kept16(int64_t n, const uint8_t* bits, int64_t column) {
    uint16_t kept = 0xffff;
    if (bits) memcpy(&kept, bits + column / 8, sizeof kept);
    return first16(n - column) & kept;
}

struct Avx512Float {
    using F = __m512;
    using Mask = Avx512Mask;
    static constexpr int kWidth = 16, kPair = 1;

    static F zero() { return _mm512_setzero_ps(); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static F load(const uint32_t* p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
    static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
    static F broadcast(const uint32_t* p) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*p))); }
    static F multiply_add(F sum, F a, F b) { return _mm512_fmadd_ps(a, b, sum); }

    // out [n, 16] = in [16, n <= 16].
    static void transpose16(const uint32_t* in, int64_t in_row, int64_t n, uint32_t* out, int64_t out_row) {
        __m512i rows[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(in + i * in_row);
        lora_ops::transpose16(rows);
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) {
            if (j < n) _mm512_storeu_si512(out + j * out_row, rows[j]);
        }
    }

    // x [n] -> out [width], a multiple of 16: zero where the bits are, and from n on.
    template <class T>
    static void pack_row(const T* x, int64_t n, const uint8_t* bits, uint32_t* out, int64_t width) {
        int64_t c = 0;
        if (!bits) {  // what is not the edge needs no masks, which cost as much as the rest
            for (; c + 16 <= std::min(n, width); c += 16) _mm512_storeu_ps(out + c, load16(x + c, 0xffff));
        }
        for (; c < width; c += 16) _mm512_storeu_ps(out + c, load16(x + c, kept16(n, bits, c)));
    }

    // y [16 J] += sums, where the bits are set.
    template <int J, class T>
    static void add_row(T* y, const F (&sums)[J], const uint8_t* bits) {
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) {
            const __mmask16 kept = kept16(16 * J, bits, 16 * j);
            store16(y + 16 * j, kept, _mm512_add_ps(load16(y + 16 * j, kept), sums[j]));
        }
    }
};

}  // namespace
}  // namespace lora_ops
