// Philox with 4 counters in the 32-bit lanes of a register, two registers at a time.
#pragma once

#include <arm_neon.h>

#include "philox/philox.h"

namespace lora_ops {
namespace {

class NeonMask {
  public:
    explicit NeonMask(const MaskKey& key) : key_(key) {
        for (int i = 0; i < kRounds; ++i) {
            round_keys_[i][0] = key.round_key0(4 + i);
            round_keys_[i][1] = key.round_key1(4 + i);
        }
    }

    void start(int64_t first_column) {
        for (int i = 0; i < kMaskCounters; ++i) {
            const ColumnShare share(key_, static_cast<uint32_t>(first_column / 8 + i));
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
        for (int i = 0; i < kMaskCounters; i += 4 * kVectors) counters(share, i, bits + i);
    }

  private:
    static constexpr int kRounds = 7;  // from the fourth on
    static constexpr int kVectors = 2;  // with 4 GCC 12 spills them

    struct Product {
        uint32x4_t low, high;
        Product(uint32x4_t a, uint32_t factor) {
            const uint32x4_t first = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(a), factor));
            const uint32x4_t last = vreinterpretq_u32_u64(vmull_high_n_u32(a, factor));
            low = vuzp1q_u32(first, last);
            high = vuzp2q_u32(first, last);
        }
    };

    // 16-bit lanes of a register of words, as `bit` where they are at least the threshold.
    static uint16x8_t kept(uint32x4_t words, uint16x8_t threshold, int word) {
        const uint32x4_t bit = vdupq_n_u32(2u << 16 << 2 * word | 1u << 2 * word);
        return vandq_u16(vcgeq_u16(vreinterpretq_u16_u32(words), threshold), vreinterpretq_u16_u32(bit));
    }

    void counters(const RowShare& share, int first, uint8_t* bits) const {
        uint32x4_t c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            const int i = first + 4 * v;
            const Product third(veorq_u32(vld1q_u32(c2_ + i), vdupq_n_u32(share.high)), kPhiloxM1);
            c0[v] = veorq_u32(third.high, vld1q_u32(c1_key_ + i));
            c1[v] = third.low;
            c2[v] = veorq_u32(vld1q_u32(high_key_ + i), vdupq_n_u32(share.low));
            c3[v] = vld1q_u32(low_ + i);
        }
#pragma GCC unroll 7
        for (int round = 0; round < kRounds; ++round) {
            const uint32x4_t k0 = vld1q_dup_u32(round_keys_[round]), k1 = vld1q_dup_u32(round_keys_[round] + 1);
            for (int v = 0; v < kVectors; ++v) {
                const Product p0(c0[v], kPhiloxM0), p1(c2[v], kPhiloxM1);
                c0[v] = veorq_u32(veorq_u32(p1.high, c1[v]), k0);
                c2[v] = veorq_u32(veorq_u32(p0.high, c3[v]), k1);
                c1[v] = p1.low;
                c3[v] = p0.low;
            }
        }
        const uint16x8_t threshold = vdupq_n_u16(static_cast<uint16_t>(key_.threshold));
        uint16x8_t of_counter[kVectors];  // two lanes each: of the low and of the high halves of its words
        for (int v = 0; v < kVectors; ++v) {
            of_counter[v] = vorrq_u16(vorrq_u16(kept(c0[v], threshold, 0), kept(c1[v], threshold, 1)),
                                      vorrq_u16(kept(c2[v], threshold, 2), kept(c3[v], threshold, 3)));
        }
        for (int v = 0; v < kVectors; v += 2) {
            vst1_u8(bits + 4 * v, vmovn_u16(vpaddq_u16(of_counter[v], of_counter[v + 1])));
        }
    }

    MaskKey key_;
    uint32_t round_keys_[kRounds][2];
    alignas(16) uint32_t c2_[kMaskCounters];
    alignas(16) uint32_t c1_key_[kMaskCounters];
    alignas(16) uint32_t high_key_[kMaskCounters];
    alignas(16) uint32_t low_[kMaskCounters];
};

}  // namespace
}  // namespace lora_ops
