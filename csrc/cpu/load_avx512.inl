// Masked loads of every dtype with AVX-512, widened to fp32 or rounded to bfloat16.
#pragma once

#include <immintrin.h>

#include "scalar.h"

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

#if defined(__AVX512BF16__)
inline __mmask32 first32(int64_t n) {
    return n >= 32 ? ~__mmask32{0} : n <= 0 ? __mmask32{0} : (__mmask32{1} << n) - 1;
}

inline __m512i load32(const BF16* x, __mmask32 kept) { return _mm512_maskz_loadu_epi16(kept, x); }
template <class T>
inline __m512i load32(const T* x, __mmask32 kept) {
    const __m512 low = load16(x, static_cast<__mmask16>(kept));
    const __m512 high = load16(x + 16, static_cast<__mmask16>(kept >> 16));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}
#endif

}  // namespace
}  // namespace lora_ops
