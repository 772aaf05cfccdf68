// 8-bit codes with AVX2: gathers of thresholds.
#pragma once

#include "blockwise8/codec.h"
#include "isa/avx2.h"

namespace lora_ops {
namespace {

inline __m256i blockwise8_encode8(const float* x, float scale, const Blockwise8Code& code) {
    const __m256i sign = _mm256_set1_epi32(INT32_MIN), one = _mm256_set1_epi32(kOneBits);
    const __m256i bits = _mm256_castps_si256(_mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(scale)));
    const __m256i magnitude = _mm256_min_epu32(_mm256_andnot_si256(sign, bits), one);
    const __m256 v = _mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(sign, bits), magnitude));
    const __m256i key = _mm256_sub_epi32(_mm256_srli_epi32(magnitude, 16), _mm256_set1_epi32(code.kFirstKey));
    const __m256i negative_bins = _mm256_and_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(code.kBins));
    const __m256i bin = _mm256_add_epi32(_mm256_max_epi32(key, _mm256_setzero_si256()), negative_bins);
    const __m256i start = _mm256_i32gather_epi32(reinterpret_cast<const int*>(code.start), bin, 1);
    __m256i found = _mm256_and_si256(start, _mm256_set1_epi32(255));
    for (int step = 0; step < code.most_steps; ++step) {
        const __m256 threshold = _mm256_i32gather_ps(code.threshold, found, 4);
        found = _mm256_sub_epi32(found, _mm256_castps_si256(_mm256_cmp_ps(v, threshold, _CMP_GT_OQ)));
    }
    return found;
}

struct Avx2Blockwise8 {
    static uint32_t max_abs_bits(const float* x, int64_t n) { return lora_ops::max_abs_bits(x, n); }
    static void encode8(const float* x, int64_t n, float scale, const Blockwise8Code& code, uint8_t* codes) {
        for (int64_t i = 0; i < n; i += 16) {
            const __m256i a = blockwise8_encode8(x + i, scale, code), b = blockwise8_encode8(x + i + 8, scale, code);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), to_bytes(narrow(a, b)));
        }
    }
    static constexpr auto decode8 = blockwise8_decode;
};

}  // namespace
}  // namespace lora_ops
