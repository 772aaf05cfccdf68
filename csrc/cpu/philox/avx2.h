// As avx512.h, with 4 counters in a register.
#pragma once

#include <immintrin.h>

#include "philox/philox.h"

namespace lora_ops {
namespace {

class Avx2Mask {
  public:
    explicit Avx2Mask(const MaskKey& key) : key_(key) {}

    void start(int64_t first_column) {
        constexpr int kOrder[4] = {0, 2, 1, 3};
        for (int i = 0; i < kMaskCounters; ++i) {
            const ColumnShare share(key_, static_cast<uint32_t>(first_column / 8 + i / 4 * 4 + kOrder[i % 4]));
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
        const RowShare share(key_, static_cast<uint32_t>(m));
        for (int v = 0; v < kMaskCounters / 4; v += 2) two_vectors(share, v, bits + 4 * v);
    }

  private:
    static __m256i load(const uint64_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
    static __m256i xor3(__m256i a, __m256i b, __m256i c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }

    void two_vectors(const RowShare& share, int first, uint8_t* bits) const {
        const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
        const __m256i high = _mm256_set1_epi64x(share.high), low = _mm256_set1_epi64x(share.low);
        __m256i c0[2], c1[2], c2[2], c3[2];
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            const int i = 4 * (first + v);
            c1[v] = _mm256_mul_epu32(m1, _mm256_xor_si256(load(c2_ + i), high));
            c0[v] = _mm256_xor_si256(_mm256_srli_epi64(c1[v], 32), load(c1_key_ + i));
            c2[v] = _mm256_xor_si256(load(high_key_ + i), low);
            c3[v] = load(low_ + i);
        }
        for (int round = 4; round < 10; ++round) {
            const __m256i k0 = _mm256_set1_epi64x(key_.round_key0(round));
            const __m256i k1 = _mm256_set1_epi64x(key_.round_key1(round));
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
                const __m256i p0 = _mm256_mul_epu32(m0, c0[v]), p1 = _mm256_mul_epu32(m1, c2[v]);
                c0[v] = xor3(_mm256_srli_epi64(p1, 32), c1[v], k0);
                c2[v] = xor3(_mm256_srli_epi64(p0, 32), c3[v], k1);
                c1[v] = p1;
                c3[v] = p0;
            }
        }
        const __m256i k0 = _mm256_set1_epi64x(key_.round_key0(10)), k1 = _mm256_set1_epi64x(key_.round_key1(10));
        const __m256i threshold = _mm256_set1_epi16(static_cast<int16_t>(key_.threshold));
        const __m256i low_halves = _mm256_set1_epi64x(0xffffffff);
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            // 0xb1 swaps the halves of a 64-bit lane.
            const __m256i p0 = _mm256_shuffle_epi32(_mm256_mul_epu32(m0, c0[v]), 0xb1);
            const __m256i p1 = _mm256_shuffle_epi32(_mm256_mul_epu32(m1, c2[v]), 0xb1);
            const __m256i words01 = _mm256_xor_si256(p1, _mm256_and_si256(_mm256_xor_si256(c1[v], k0), low_halves));
            const __m256i words23 = _mm256_xor_si256(p0, _mm256_and_si256(_mm256_xor_si256(c3[v], k1), low_halves));
            const __m256i a = _mm256_unpacklo_epi64(words01, words23), b = _mm256_unpackhi_epi64(words01, words23);
            const __m256i kept = _mm256_packs_epi16(_mm256_cmpeq_epi16(_mm256_max_epu16(a, threshold), a),
                                                    _mm256_cmpeq_epi16(_mm256_max_epu16(b, threshold), b));
            const uint32_t in_order = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(kept, 0xd8)));
            memcpy(bits + 4 * v, &in_order, sizeof in_order);
        }
    }

    MaskKey key_;
    alignas(32) uint64_t c2_[kMaskCounters];
    alignas(32) uint64_t c1_key_[kMaskCounters];
    alignas(32) uint64_t high_key_[kMaskCounters];
    alignas(32) uint64_t low_[kMaskCounters];
};

}  // namespace
}  // namespace lora_ops
