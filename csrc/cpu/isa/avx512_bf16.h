// AVX-512 BF16: elements of every type, rounded to vectors of 32 bfloat16.
#pragma once

#include "isa/avx512.h"

namespace lora_ops {
namespace {

inline __mmask32 first32(int64_t n) {
    return n >= 32 ? ~__mmask32{0} : n <= 0 ? __mmask32{0} : (__mmask32{1} << n) - 1;
}

inline __m512i load32(const BF16* x, __mmask32 kept) { return _mm512_maskz_loadu_epi16(kept, x); }
template <class T>
inline __m512i load32(const T* x, __mmask32 kept) {
    const __m512 low = load16(x, static_cast<__mmask16>(kept));
    const __m512 high = load16(x + 16, static_cast<__mmask16>(kept >> 16));
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

inline __m512bh as_bf16(__m512i x) { return reinterpret_cast<__m512bh>(x); }

}  // namespace
}  // namespace lora_ops
