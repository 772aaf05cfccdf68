// What lora.inl needs, with AVX-512: products of floats, and packing from every dtype.
#pragma once

#include <immintrin.h>

#include "load_avx512.inl"
#include "lora.inl"
#include "philox_avx512.inl"

namespace lora_ops {
namespace {

inline __mmask16 kept16(int64_t n, const uint8_t* bits, int64_t column) {
    uint16_t kept = 0xffff;
    if (bits) memcpy(&kept, bits + column / 8, sizeof kept);
    return first16(n - column) & kept;
}

inline void store16(float* x, __mmask16 kept, __m512 v) { _mm512_mask_storeu_ps(x, kept, v); }
inline void store16(F16* x, __mmask16 kept, __m512 v) {
    _mm256_mask_storeu_epi16(x, kept, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store16(BF16* x, __mmask16 kept, __m512 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i high = _mm512_srli_epi32(bits, 16);
    const __m512i half = _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
    _mm256_mask_storeu_epi16(x, kept, _mm512_cvtepi32_epi16(result));
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
        __m512i a[16], b[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(in + i * in_row);
#pragma GCC unroll 8
        for (int i = 0; i < 16; i += 2) {  // pairs of rows
            b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 16; i += 4) {  // fours: a[i + j] holds columns j, j + 4, j + 8, j + 12
            a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
            a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
            a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
            a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const __m512i even_low = _mm512_shuffle_i32x4(a[j], a[j + 4], 0x88);  // columns j, j + 8 of rows 0-7
            const __m512i odd_low = _mm512_shuffle_i32x4(a[j], a[j + 4], 0xdd);   // columns j + 4, j + 12
            const __m512i even_high = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0x88);
            const __m512i odd_high = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0xdd);
            b[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
            b[j + 4] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
            b[j + 8] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
            b[j + 12] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
        }
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) {
            if (j < n) _mm512_storeu_si512(out + j * out_row, b[j]);
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
