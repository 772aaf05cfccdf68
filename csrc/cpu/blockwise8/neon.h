// 8-bit codes with NEON. It has no gathers: bins and comparisons are computed by vectors, entries loaded one by one.
#pragma once

#include "blockwise8/portable.h"
#include "isa/neon.h"

namespace lora_ops {
namespace {

// 4 values as blockwise8_encode compares them, and their bins.
struct Blockwise8Bins {
    float32x4_t v;
    uint16x4_t bin;
    Blockwise8Bins(const float* x, float scale, const Blockwise8Code& code) {
        const uint32x4_t bits = vreinterpretq_u32_f32(vmulq_n_f32(vld1q_f32(x), scale));
        const uint32x4_t sign = vdupq_n_u32(0x80000000u);
        const uint32x4_t magnitude = vminq_u32(vbicq_u32(bits, sign), vdupq_n_u32(kOneBits));
        v = vreinterpretq_f32_u32(vbslq_u32(sign, bits, magnitude));
        const uint32x4_t key = vqsubq_u32(vshrq_n_u32(magnitude, 16), vdupq_n_u32(code.kFirstKey));
        const uint32x4_t negative = vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_u32(bits), 31));
        bin = vmovn_u32(vmlsq_u32(key, negative, vdupq_n_u32(code.kBins)));
    }
};

template <int lane>
inline void blockwise8_look_up(uint16x8_t bins, const Blockwise8Code& code, uint8x8_t& found, float32x4_t& threshold) {
    const uint8_t start = code.start[vgetq_lane_u16(bins, lane)];
    found = vset_lane_u8(start, found, lane);
    threshold = vld1q_lane_f32(code.threshold + start, threshold, lane % 4);
}

// 8 elements, for a map that one comparison settles.
inline uint8x8_t blockwise8_encode8(const float* x, float scale, const Blockwise8Code& code) {
    const Blockwise8Bins a(x, scale, code), b(x + 4, scale, code);
    const uint16x8_t bins = vcombine_u16(a.bin, b.bin);
    uint8x8_t found = vdup_n_u8(0);
    float32x4_t low = vdupq_n_f32(0), high = low;
    blockwise8_look_up<0>(bins, code, found, low);
    blockwise8_look_up<1>(bins, code, found, low);
    blockwise8_look_up<2>(bins, code, found, low);
    blockwise8_look_up<3>(bins, code, found, low);
    blockwise8_look_up<4>(bins, code, found, high);
    blockwise8_look_up<5>(bins, code, found, high);
    blockwise8_look_up<6>(bins, code, found, high);
    blockwise8_look_up<7>(bins, code, found, high);
    const uint16x8_t above = vcombine_u16(vmovn_u32(vcgtq_f32(a.v, low)), vmovn_u32(vcgtq_f32(b.v, high)));
    return vsub_u8(found, vmovn_u16(above));
}

struct NeonBlockwise8 {
    static uint32_t max_abs_bits(const float* x, int64_t n) { return lora_ops::max_abs_bits(x, n); }

    static void encode8(const float* x, int64_t n, float scale, const Blockwise8Code& code, uint8_t* codes) {
        if (code.most_steps != 1) return PortableBlockwise8::encode8(x, n, scale, code, codes);
        for (int64_t i = 0; i < n; i += 8) vst1_u8(codes + i, blockwise8_encode8(x + i, scale, code));
    }

    static void decode8(const uint8_t* codes, int64_t n, float scale, const Blockwise8Code& code, float* out) {
        for (int64_t i = 0; i < n; i += 4) {
            float32x4_t value = vdupq_n_f32(code.map[codes[i]]);
            value = vld1q_lane_f32(code.map + codes[i + 1], value, 1);
            value = vld1q_lane_f32(code.map + codes[i + 2], value, 2);
            value = vld1q_lane_f32(code.map + codes[i + 3], value, 3);
            vst1q_f32(out + i, vmulq_n_f32(value, scale));
        }
    }
};

}  // namespace
}  // namespace lora_ops
