// Philox with 8 counters in the 64-bit lanes of a register. vpmuludq reads only the low half of a lane, so the high
// halves hold what they like until the end: a round is two multiplications, two shifts and two ternary exclusive ors.
#pragma once

#include <immintrin.h>

#include "philox/philox.h"

namespace lora_ops {
namespace {

class Avx512Mask {
  public:
    explicit Avx512Mask(const MaskKey& key) : key_(key) {}

    void start(int64_t first_column) {
        // In this order, the unpacking of 64-bit lanes at the end of row() puts 32 elements in their order.
        constexpr int kOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};
        for (int i = 0; i < kMaskCounters; ++i) {
            const ColumnShare share(key_, static_cast<uint32_t>(first_column / 8 + i / 8 * 8 + kOrder[i % 8]));
            c2_[i] = share.c2;
            c1_key_[i] = share.c1_key;
            high_key_[i] = share.high_key;
            low_[i] = share.low;
        }
    }

    void row(int64_t m, uint8_t* bits) const {
        if (key_.drops_all()) {
            memset(bits, 0, kMaskBytes);
            return;
        }
        constexpr int kVectors = kMaskCounters / 8;  // independent chains: they hide the latency of each other
        const RowShare share(key_, static_cast<uint32_t>(m));
        const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
        const __m512i high = _mm512_set1_epi64(share.high), low = _mm512_set1_epi64(share.low);
        __m512i c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            c1[v] = _mm512_mul_epu32(m1, _mm512_xor_si512(_mm512_load_si512(c2_ + 8 * v), high));
            c0[v] = _mm512_xor_si512(_mm512_srli_epi64(c1[v], 32), _mm512_load_si512(c1_key_ + 8 * v));
            c2[v] = _mm512_xor_si512(_mm512_load_si512(high_key_ + 8 * v), low);
            c3[v] = _mm512_load_si512(low_ + 8 * v);
        }
#pragma GCC unroll 7
        for (int round = 4; round < 10; ++round) {
            const __m512i k0 = _mm512_set1_epi64(key_.round_key0(round));
            const __m512i k1 = _mm512_set1_epi64(key_.round_key1(round));
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                const __m512i p0 = _mm512_mul_epu32(m0, c0[v]), p1 = _mm512_mul_epu32(m1, c2[v]);
                c0[v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1[v], k0, 0x96);
                c2[v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3[v], k1, 0x96);
                c1[v] = p1;
                c3[v] = p0;
            }
        }
        const __m512i k0 = _mm512_set1_epi64(key_.round_key0(10)), k1 = _mm512_set1_epi64(key_.round_key1(10));
        const __m512i threshold = _mm512_set1_epi16(static_cast<int16_t>(key_.threshold));
        constexpr __mmask16 kLowHalves = 0x5555;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            const __m512i p0 = _mm512_ror_epi64(_mm512_mul_epu32(m0, c0[v]), 32);
            const __m512i p1 = _mm512_ror_epi64(_mm512_mul_epu32(m1, c2[v]), 32);
            const __m512i words01 = _mm512_mask_xor_epi32(p1, kLowHalves, p1, _mm512_xor_si512(c1[v], k0));
            const __m512i words23 = _mm512_mask_xor_epi32(p0, kLowHalves, p0, _mm512_xor_si512(c3[v], k1));
            const uint32_t kept[] = {
                _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(words01, words23), threshold),
                _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(words01, words23), threshold),
            };
            memcpy(bits + 8 * v, kept, sizeof kept);
        }
    }

  private:
    MaskKey key_;
    alignas(64) uint64_t c2_[kMaskCounters];
    alignas(64) uint64_t c1_key_[kMaskCounters];
    alignas(64) uint64_t high_key_[kMaskCounters];
    alignas(64) uint64_t low_[kMaskCounters];
};

}  // namespace
}  // namespace lora_ops
