// AVX-512 F, BW, DQ, VL: elements of every type to vectors of 16 floats and back, transposes, and the largest magnitude.
#pragma once

#include <immintrin.h>

#include "common/scalar.h"

namespace lora_ops {
namespace {

inline __mmask16 first16(int64_t n) {
    return n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : static_cast<__mmask16>((1u << n) - 1);
}

// Elements that the mask does not keep are zero, and are not read.
inline __m512 load16(const float* x, __mmask16 kept) { return _mm512_maskz_loadu_ps(kept, x); }
inline __m512 load16(const F16* x, __mmask16 kept) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(kept, x)); }
inline __m512 load16(const BF16* x, __mmask16 kept) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(kept, x)), 16));
}

// Rounds to nearest even with integers: vcvtneps2bf16 would flush denormals to zero.
inline __m256i to_16_bits(__m512 x, BF16) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i high = _mm512_srli_epi32(bits, 16);
    const __m512i lowest_kept = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(lowest_kept, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
}
inline __m256i to_16_bits(__m512 x, F16) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline void store16(float* x, __mmask16 kept, __m512 v) { _mm512_mask_storeu_ps(x, kept, v); }
template <class T>
inline void store16(T* x, __mmask16 kept, __m512 v) { _mm256_mask_storeu_epi16(x, kept, to_16_bits(v, T{})); }

inline __m512 widen(__m256i x, F16) { return _mm512_cvtph_ps(x); }
inline __m512 widen(__m256i x, BF16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

// Columns of 16 rows of 32 bits.
inline void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        const __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
        t[i] = _mm512_unpacklo_epi64(a, c);
        t[i + 1] = _mm512_unpackhi_epi64(a, c);
        t[i + 2] = _mm512_unpacklo_epi64(b, d);
        t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int i = 0; i < 4; ++i) {
        const __m512i a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
        r[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

inline __m512i magnitude(__m512 x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)); }

inline uint32_t max_abs_bits(const float* x, int64_t n) {
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 16) largest = _mm512_max_epu32(largest, magnitude(_mm512_loadu_ps(x + i)));
    return _mm512_reduce_max_epu32(largest);
}

inline uint32_t max_u16(__m512i x) {
    const __m256i y = _mm256_max_epu16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    const __m128i z = _mm_max_epu16(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    // The hardware has a horizontal minimum of 16-bit numbers only: the maximum is the complement's minimum.
    return ~_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(z, _mm_set1_epi16(-1)))) & 0xffffu;
}

// T has 16 bits.
template <class T>
inline uint32_t max_abs_bits(const T* w, int64_t n) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 32) {
        largest = _mm512_max_epu16(largest, _mm512_and_si512(_mm512_loadu_si512(w + i), magnitude));
    }
    return max_u16(largest);
}

}  // namespace
}  // namespace lora_ops
