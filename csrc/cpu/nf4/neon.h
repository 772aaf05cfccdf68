// The NF4 codec with NEON: 4 lanes, lookups in tables of bytes.
#pragma once

#include "isa/neon.h"
#include "nf4/codec.h"

namespace lora_ops {
namespace {

// A level of a binary search over the thresholds: 2 * code + (v > threshold).
inline uint32x4_t next_bit(float32x4_t v, uint32x4_t code, float32x4_t threshold) {
    return vsubq_u32(vaddq_u32(code, code), vcgtq_f32(v, threshold));
}

// Where the bytes of floats stand in a table of them.
inline uint8x16_t bytes_of(uint32x4_t index) {
    return vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100), index, 0x04040404));
}

inline uint32x4_t nf4_encode4(float32x4_t v) {
    constexpr auto t = nf4_threshold;
    constexpr float kThird[4] = {t(1), t(5), t(9), t(13)};
    constexpr float kLast[8] = {t(0), t(2), t(4), t(6), t(8), t(10), t(12), t(14)};
    const uint8x16_t third = vreinterpretq_u8_f32(vld1q_f32(kThird));
    const uint8x16x2_t last = {{vreinterpretq_u8_f32(vld1q_f32(kLast)), vreinterpretq_u8_f32(vld1q_f32(kLast + 4))}};
    const uint32x4_t upper = vcgtq_f32(v, vdupq_n_f32(t(7)));
    uint32x4_t code = vshrq_n_u32(upper, 31);
    code = next_bit(v, code, vbslq_f32(upper, vdupq_n_f32(t(11)), vdupq_n_f32(t(3))));
    code = next_bit(v, code, vreinterpretq_f32_u8(vqtbl1q_u8(third, bytes_of(code))));
    return next_bit(v, code, vreinterpretq_f32_u8(vqtbl2q_u8(last, bytes_of(code))));
}

// 8 elements, split by the parity of their index: the two nibbles of a byte come from the same lane.
inline float32x4x2_t load_pairs(const float* w) { return vld2q_f32(w); }
inline float32x4x2_t load_pairs(const F16* w) {
    const uint16x4x2_t bits = vld2_u16(words_of(w));
    return {{widen(bits.val[0], F16{}), widen(bits.val[1], F16{})}};
}
inline float32x4x2_t load_pairs(const BF16* w) {
    const uint32x4_t bits = vreinterpretq_u32_u16(vld1q_u16(words_of(w)));
    return {{vreinterpretq_f32_u32(vshlq_n_u32(bits, 16)),
             vreinterpretq_f32_u32(vandq_u32(bits, vdupq_n_u32(0xffff0000u)))}};
}

// 8 elements -> 4 packed bytes, one in each lane.
template <class T>
uint16x4_t nf4_encode_pairs(const T* w, float scale) {
    const float32x4x2_t x = load_pairs(w);
    const uint32x4_t even = nf4_encode4(vmulq_n_f32(x.val[0], scale)), odd = nf4_encode4(vmulq_n_f32(x.val[1], scale));
    return vmovn_u32(vsliq_n_u32(odd, even, 4));
}

// A byte of each of 16 values: one lookup serves 16 codes.
inline uint8x16_t look_up(uint8x16_t bytes, uint8x16_t codes) { return vqtbl1q_u8(bytes, codes); }

struct NeonNF4 {
    template <class T>
    static uint32_t max_abs_bits(const T* w, int64_t n) {
        return lora_ops::max_abs_bits(w, n);
    }

    template <class T>
    static void encode32(const T* w, float scale, uint8_t* packed) {
        for (int i = 0; i < 2; ++i) {
            const T* const from = w + 16 * i;
            const uint16x8_t words = vcombine_u16(nf4_encode_pairs(from, scale), nf4_encode_pairs(from + 8, scale));
            vst1_u8(packed + 8 * i, vmovn_u16(words));
        }
    }

    template <class T>
    struct Table {
        uint8x16_t low, high;  // the lower and the upper byte of the 16 values
        explicit Table(float absmax) {
            uint16x4_t part[4];
            for (int i = 0; i < 4; ++i) part[i] = to_16_bits(vmulq_n_f32(vld1q_f32(kNF4Code + 4 * i), absmax), T{});
            const uint8x16_t a = vreinterpretq_u8_u16(vcombine_u16(part[0], part[1]));
            const uint8x16_t b = vreinterpretq_u8_u16(vcombine_u16(part[2], part[3]));
            low = vuzp1q_u8(a, b);
            high = vuzp2q_u8(a, b);
        }

        void look_up16(uint8x16_t codes, T* out) const {
            const uint8x16_t l = look_up(low, codes), h = look_up(high, codes);
            vst1q_u16(words_of(out), vreinterpretq_u16_u8(vzip1q_u8(l, h)));
            vst1q_u16(words_of(out + 8), vreinterpretq_u16_u8(vzip2q_u8(l, h)));
        }
    };

    template <class T>
    static void decode32(const Table<T>& table, const uint8_t* packed, T* out) {
        const uint8x16_t bytes = vld1q_u8(packed);
        const uint8x16_t even = vshrq_n_u8(bytes, 4), odd = vandq_u8(bytes, vdupq_n_u8(15));
        table.look_up16(vzip1q_u8(even, odd), out);
        table.look_up16(vzip2q_u8(even, odd), out + 16);
    }
};

template <>
struct NeonNF4::Table<float> {
    uint8x16_t bytes[4];  // byte i of the 16 values
    explicit Table(float absmax) {
        float32x4_t value[4];
        for (int i = 0; i < 4; ++i) value[i] = vmulq_n_f32(vld1q_f32(kNF4Code + 4 * i), absmax);
        set(value);
    }

    void set(const float32x4_t (&value)[4]) {
        const auto words = [&](int i) { return vreinterpretq_u16_f32(value[i]); };
        const uint8x16_t low_a = vreinterpretq_u8_u16(vuzp1q_u16(words(0), words(1)));
        const uint8x16_t low_b = vreinterpretq_u8_u16(vuzp1q_u16(words(2), words(3)));
        const uint8x16_t high_a = vreinterpretq_u8_u16(vuzp2q_u16(words(0), words(1)));
        const uint8x16_t high_b = vreinterpretq_u8_u16(vuzp2q_u16(words(2), words(3)));
        bytes[0] = vuzp1q_u8(low_a, low_b);
        bytes[1] = vuzp2q_u8(low_a, low_b);
        bytes[2] = vuzp1q_u8(high_a, high_b);
        bytes[3] = vuzp2q_u8(high_a, high_b);
    }

    void look_up16(uint8x16_t codes, float* out) const {
        uint8x16_t b[4];
        for (int i = 0; i < 4; ++i) b[i] = look_up(bytes[i], codes);
        const auto store8 = [&](uint8x16_t low, uint8x16_t high, float* to) {
            const uint16x8_t l = vreinterpretq_u16_u8(low), h = vreinterpretq_u16_u8(high);
            vst1q_f32(to, vreinterpretq_f32_u16(vzip1q_u16(l, h)));
            vst1q_f32(to + 4, vreinterpretq_f32_u16(vzip2q_u16(l, h)));
        };
        store8(vzip1q_u8(b[0], b[1]), vzip1q_u8(b[2], b[3]), out);
        store8(vzip2q_u8(b[0], b[1]), vzip2q_u8(b[2], b[3]), out + 8);
    }
};

}  // namespace
}  // namespace lora_ops
