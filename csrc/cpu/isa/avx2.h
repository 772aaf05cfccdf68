// AVX2, FMA, F16C: elements of every type to vectors of 8 floats and back, look-ups, and the largest magnitude of many.
#pragma once

#include <immintrin.h>

#include "common/scalar.h"

namespace lora_ops {
namespace {

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

// 8 + 8 numbers of 32 bits below 2^16 -> 16 numbers of 16 bits, in order.
inline __m256i narrow(__m256i a, __m256i b) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8); }

// 16 numbers of 16 bits below 2^8 -> 16 bytes.
inline __m128i to_bytes(__m256i words) {
    return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

inline __m256 widen(__m128i x, F16) { return _mm256_cvtph_ps(x); }
inline __m256 widen(__m128i x, BF16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}

inline __m128i to_16_bits(__m256 x, F16) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
inline __m128i to_16_bits(__m256 x, BF16) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i high = _mm256_srli_epi32(bits, 16);
    const __m256i lowest_kept = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(lowest_kept, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    return _mm256_castsi256_si128(narrow(_mm256_blendv_epi8(rounded, quiet, nan), _mm256_setzero_si256()));
}

inline __m256 load8(const float* x) { return _mm256_loadu_ps(x); }
template <class T>
inline __m256 load8(const T* x) { return widen(load128(x), T{}); }

inline void store8(float* x, __m256 v) { _mm256_storeu_ps(x, v); }
template <class T>
inline void store8(T* x, __m256 v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(x), to_16_bits(v, T{})); }

// 8 entries of a table, at index(0) ... index(7). A gather takes twice as long on Zen, and more where it was made safe.
template <class Index>
inline __m256 look_up8(const float* table, Index index) {
    const auto entry = [&](int i) { return _mm256_broadcast_ss(table + index(i)); };
    const __m256 a = _mm256_blend_ps(entry(0), entry(1), 0x02), b = _mm256_blend_ps(entry(2), entry(3), 0x08);
    const __m256 c = _mm256_blend_ps(entry(4), entry(5), 0x20), d = _mm256_blend_ps(entry(6), entry(7), 0x80);
    return _mm256_blend_ps(_mm256_blend_ps(a, b, 0x0c), _mm256_blend_ps(c, d, 0xc0), 0xf0);
}

inline uint32_t largest_of(__m256i v) {
    __m128i x = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0x4e));
    x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0xb1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(x));
}

// The largest abs_bits of n elements, a multiple of 32.
inline uint32_t max_abs_bits(const float* w, int64_t n) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i largest = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += 8) {
        largest = _mm256_max_epu32(largest, _mm256_and_si256(load256(w + i), magnitude));
    }
    return largest_of(largest);
}

// T has 16 bits.
template <class T>
inline uint32_t max_abs_bits(const T* w, int64_t n) {
    const __m256i magnitude = _mm256_set1_epi16(0x7fff);
    __m256i largest = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += 16) {
        largest = _mm256_max_epu16(largest, _mm256_and_si256(load256(w + i), magnitude));
    }
    const __m128i x = _mm_max_epu16(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    // The hardware has a horizontal minimum of 16-bit numbers only: the maximum is the complement's minimum.
    return ~_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(x, _mm_set1_epi16(-1)))) & 0xffffu;
}

}  // namespace
}  // namespace lora_ops
