// AdamW with 8-bit states and AVX2.
#pragma once

#include "adamw/update.h"
#include "blockwise8/avx2.h"

namespace lora_ops {
namespace {

// adamw_update of 8 elements with coded states, in its order of operations. The root and the quotient keep one pipe busy for
// as long as the loads of the look-ups take two others: together they take no longer than either.
inline void adamw_update8(float* p, const float* g, __m256& m, __m256& v, const AdamwConstants& c) {
    const __m256 grad = _mm256_mul_ps(_mm256_loadu_ps(g), _mm256_set1_ps(c.sign));
    m = _mm256_add_ps(m, _mm256_mul_ps(_mm256_sub_ps(grad, m), _mm256_set1_ps(c.beta1c)));
    v = _mm256_add_ps(_mm256_mul_ps(v, _mm256_set1_ps(c.beta2)),
                      _mm256_mul_ps(_mm256_mul_ps(grad, _mm256_set1_ps(c.beta2c)), grad));
    const __m256 below = _mm256_add_ps(_mm256_mul_ps(_mm256_sqrt_ps(v), _mm256_set1_ps(c.bias2)), _mm256_set1_ps(c.eps));
    const __m256 way = _mm256_div_ps(_mm256_mul_ps(m, _mm256_set1_ps(c.step_size)), below);
    _mm256_storeu_ps(p, _mm256_sub_ps(_mm256_mul_ps(_mm256_loadu_ps(p), _mm256_set1_ps(c.decay)), way));
}

// The update of a whole block, which finds the largest values too.
struct Avx2CodedUpdate {
    using Vec = Avx2Blockwise8;
    static constexpr int64_t kAhead = 512;  // elements between a fetch and its use: two blocks

    static void run(float* p, const float* g, int64_t n, const CodedBlock& block, const AdamwConstants& constants,
                    const AdamwCodes& codes) {
        if (n < kAdamwBlock) return CodedUpdate<Vec>::run(p, g, n, block, constants, codes);
        alignas(64) float m[kAdamwBlock], v[kAdamwBlock];
        update(p, g, block, constants, codes, m, v);
        const float m_scale = 1.0f / at_least(*block.m_absmax, kLeastAbsmax);
        const float v_scale = 1.0f / at_least(*block.v_absmax, kLeastAbsmax);
        if (!blockwise8_settles(*codes.exp_avg, *block.m_absmax) || !blockwise8_settles(*codes.exp_avg_sq, *block.v_absmax)) {
            Vec::encode8(m, kAdamwBlock, m_scale, *codes.exp_avg, block.m_codes);
            Vec::encode8(v, kAdamwBlock, v_scale, *codes.exp_avg_sq, block.v_codes);
            return;
        }
        const Blockwise8Encoder m_encoder(*codes.exp_avg, m_scale), v_encoder(*codes.exp_avg_sq, v_scale);
        alignas(32) int16_t m_bins[2 * kAdamwBlock], v_bins[2 * kAdamwBlock];
        for (int i = 0; i < kAdamwBlock; i += 8) {
            m_encoder.bins8(m + i, m_bins + 2 * i);
            v_encoder.bins8(v + i, v_bins + 2 * i);
        }
        for (int i = 0; i < kAdamwBlock; i += 32) {
            m_encoder.codes32(m + i, m_bins + 2 * i, block.m_codes + i);
            v_encoder.codes32(v + i, v_bins + 2 * i, block.v_codes + i);
        }
    }

    static void update(float* p, const float* g, const CodedBlock& block, const AdamwConstants& constants,
                       const AdamwCodes& codes, float* m, float* v) {
        const AdamwConstants c = constants;
        const __m256 m_absmax = _mm256_set1_ps(*block.m_absmax), v_absmax = _mm256_set1_ps(*block.v_absmax);
        __m256i m_largest = _mm256_setzero_si256(), v_largest = m_largest;
        const __m256i magnitude = _mm256_set1_epi32(INT32_MAX);
        for (int i = 0; i < kAdamwBlock; i += 8) {
            if (i % 64 == 0) fetch64(p + i, g + i, block.m_codes + i, block.v_codes + i);
            __m256 m8 = decode8(*codes.exp_avg, block.m_codes + i, m_absmax);
            __m256 v8 = decode8(*codes.exp_avg_sq, block.v_codes + i, v_absmax);
            adamw_update8(p + i, g + i, m8, v8, c);
            _mm256_store_ps(m + i, m8);
            _mm256_store_ps(v + i, v8);
            m_largest = _mm256_max_epu32(m_largest, _mm256_and_si256(_mm256_castps_si256(m8), magnitude));
            v_largest = _mm256_max_epu32(v_largest, _mm256_and_si256(_mm256_castps_si256(v8), magnitude));
        }
        *block.m_absmax = bits_float(largest_of(m_largest));
        *block.v_absmax = bits_float(largest_of(v_largest));
    }

    static __m256 decode8(const Blockwise8Code& code, const uint8_t* codes, __m256 absmax) {
        return _mm256_mul_ps(look_up8(code.map, [&](int i) { return codes[i]; }), absmax);
    }

    // Passes over a block of 256 leave the hardware too little of each stream to foresee the next: 1.4 times the time.
    static void fetch64(const float* p, const float* g, const uint8_t* m_codes, const uint8_t* v_codes) {
        for (int i = 0; i < 64; i += 16) {
            __builtin_prefetch(p + kAhead + i, 1);
            __builtin_prefetch(g + kAhead + i);
        }
        __builtin_prefetch(m_codes + kAhead, 1);
        __builtin_prefetch(v_codes + kAhead, 1);
    }
};

}  // namespace
}  // namespace lora_ops
