// 8-bit codes with AVX2: look-ups by loads that broadcast, and blends.
#pragma once

#include "blockwise8/codec.h"
#include "isa/avx2.h"

namespace lora_ops {
namespace {

// Codes values by `settled` of their code, in two steps with memory in between: bins that were taken out of registers would
// cost three operations each where a load is one, and a load right after the store has to wait for it.
class Blockwise8Encoder {
  public:
    Blockwise8Encoder(const Blockwise8Code& code, float scale)
        : scale_(_mm256_set1_ps(scale)),
          entries_(reinterpret_cast<const float*>(code.settled + Blockwise8Code::kBins - 1)) {}

    // The bins of 8 values, signed, are the upper halves of their lanes: the subtraction stops at 0.
    void bins8(const float* x, int16_t* bins) const {
        const __m256i v = value8(x), magnitude = _mm256_and_si256(v, _mm256_set1_epi32(INT32_MAX));
        const __m256i bin = _mm256_subs_epu16(magnitude, _mm256_set1_epi32(Blockwise8Code::kFirstKey << 16));
        _mm256_store_si256(reinterpret_cast<__m256i*>(bins), _mm256_sign_epi16(bin, v));
    }

    void codes32(const float* x, const int16_t* bins, uint8_t* codes) const {
        __m256i found[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            found[i] = _mm256_and_si256(code8(value8(x + 8 * i), bins + 16 * i), _mm256_set1_epi32(255));
        }
        const __m256i words = _mm256_packus_epi16(_mm256_packus_epi32(found[0], found[1]),
                                                  _mm256_packus_epi32(found[2], found[3]));
        const __m256i in_order = _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), in_order);
    }

  private:
    __m256i value8(const float* x) const { return _mm256_castps_si256(_mm256_mul_ps(_mm256_loadu_ps(x), scale_)); }

    __m256i code8(__m256i v, const int16_t* bins) const {
        const __m256i entry = _mm256_castps_si256(look_up8(entries_, [&](int i) { return bins[2 * i + 1]; }));
        const __m256i above = _mm256_cmpgt_epi32(_mm256_slli_epi32(v, 8), entry);  // -1
        return _mm256_sub_epi32(entry, _mm256_sign_epi32(above, v));
    }

    __m256 scale_;
    const float* entries_;
};

// Whether values of a block with this absmax are found so: finite ones are.
inline bool blockwise8_settles(const Blockwise8Code& code, float absmax) {
    return code.settles && abs_bits(absmax) < kInfBits<float>;
}

struct Avx2Blockwise8 {
    static uint32_t max_abs_bits(const float* x, int64_t n) { return lora_ops::max_abs_bits(x, n); }

    static void encode8(const float* x, int64_t n, float scale, const Blockwise8Code& code, uint8_t* codes) {
        if (!code.settles || !(scale > 0)) {  // or a block whose absmax is not finite
            for (int64_t i = 0; i < n; ++i) codes[i] = blockwise8_encode(x[i] * scale, code);
            return;
        }
        constexpr int64_t kSpan = 256;
        alignas(32) int16_t bins[2 * kSpan];
        const Blockwise8Encoder encoder(code, scale);
        for (; n > 0; n -= kSpan, x += kSpan, codes += kSpan) {
            const int64_t count = lesser(kSpan, n);
            for (int64_t i = 0; i < count; i += 8) encoder.bins8(x + i, bins + 2 * i);
            for (int64_t i = 0; i < count; i += 32) encoder.codes32(x + i, bins + 2 * i, codes + i);
        }
    }

    static void decode8(const uint8_t* codes, int64_t n, float scale, const Blockwise8Code& code, float* out) {
        const __m256 scales = _mm256_set1_ps(scale);
        for (int64_t i = 0; i < n; i += 8) {
            const __m256 value = look_up8(code.map, [&](int j) { return codes[i + j]; });
            _mm256_storeu_ps(out + i, _mm256_mul_ps(value, scales));
        }
    }
};

}  // namespace
}  // namespace lora_ops
