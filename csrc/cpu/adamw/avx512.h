// AdamW with 8-bit states and AVX-512.
//
// A block is decoded, updated, guessed and settled in short loops, each with its tables in registers: on Zen 4 27, 64,
// 46 and 37 cycles for 64 elements. Woven into one loop they compete for registers and for the 64 places in which operations
// wait: 185 cycles instead of 197 for all in cache, and no faster from memory.
#pragma once

#include "adamw/update.h"
#include "blockwise8/avx512.h"

namespace lora_ops {
namespace {

// adamw_update, in its order of operations: on Zen 4 16 cycles, all of them its root's and its quotient's.
inline void adamw_update16(float* p, const float* g, float* m_now, float* v_now, const AdamwConstants& c,
                           __m512i& m_largest, __m512i& v_largest) {
    const __m512 grad = _mm512_mul_ps(_mm512_loadu_ps(g), _mm512_set1_ps(c.sign));
    __m512 m = _mm512_load_ps(m_now), v = _mm512_load_ps(v_now);
    m = _mm512_add_ps(m, _mm512_mul_ps(_mm512_sub_ps(grad, m), _mm512_set1_ps(c.beta1c)));
    v = _mm512_add_ps(_mm512_mul_ps(v, _mm512_set1_ps(c.beta2)),
                      _mm512_mul_ps(_mm512_mul_ps(grad, _mm512_set1_ps(c.beta2c)), grad));
    const __m512 below = _mm512_add_ps(_mm512_mul_ps(_mm512_sqrt_ps(v), _mm512_set1_ps(c.bias2)), _mm512_set1_ps(c.eps));
    const __m512 way = _mm512_div_ps(_mm512_mul_ps(m, _mm512_set1_ps(c.step_size)), below);
    _mm512_storeu_ps(p, _mm512_sub_ps(_mm512_mul_ps(_mm512_loadu_ps(p), _mm512_set1_ps(c.decay)), way));
    _mm512_store_ps(m_now, m);
    _mm512_store_ps(v_now, v);
    m_largest = _mm512_max_epu32(m_largest, magnitude(m));
    v_largest = _mm512_max_epu32(v_largest, magnitude(v));
}

// The update of a whole block, which finds the largest values too.
template <class LookUp>
struct Avx512CodedUpdate {
    using Vec = Avx512Blockwise8<LookUp>;

    static void run(float* p, const float* g, int64_t n, const CodedBlock& block, const AdamwConstants& constants,
                    const AdamwCodes& codes) {
        if (n < kAdamwBlock) return CodedUpdate<Vec>::run(p, g, n, block, constants, codes);
        const AdamwConstants c = constants;
        alignas(64) float m[kAdamwBlock], v[kAdamwBlock];
        Vec::decode8(block.m_codes, kAdamwBlock, *block.m_absmax, *codes.exp_avg, m);
        Vec::decode8(block.v_codes, kAdamwBlock, *block.v_absmax, *codes.exp_avg_sq, v);
        __m512i m_largest = _mm512_setzero_si512(), v_largest = m_largest;
        for (int i = 0; i < kAdamwBlock; i += 16) adamw_update16(p + i, g + i, m + i, v + i, c, m_largest, v_largest);
        *block.m_absmax = bits_float(_mm512_reduce_max_epu32(m_largest));
        *block.v_absmax = bits_float(_mm512_reduce_max_epu32(v_largest));
        Vec::encode8(m, kAdamwBlock, 1.0f / at_least(*block.m_absmax, kLeastAbsmax), *codes.exp_avg, block.m_codes);
        Vec::encode8(v, kAdamwBlock, 1.0f / at_least(*block.v_absmax, kLeastAbsmax), *codes.exp_avg_sq, block.v_codes);
    }
};

}  // namespace
}  // namespace lora_ops
