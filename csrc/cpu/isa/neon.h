// NEON of 64-bit ARM: elements of every type to vectors of 4 floats and back, and the largest magnitude of many.
#pragma once

#include <arm_neon.h>

#include "common/scalar.h"

namespace lora_ops {
namespace {

// Compilers turn these into unaligned loads and stores; C++ knows F16 and BF16 as what they hold.
inline const uint16_t* words_of(const void* p) { return static_cast<const uint16_t*>(p); }
inline uint16_t* words_of(void* p) { return static_cast<uint16_t*>(p); }

inline float32x4_t widen(uint16x4_t x, F16) { return vcvt_f32_f16(vreinterpret_f16_u16(x)); }
inline float32x4_t widen(uint16x4_t x, BF16) { return vreinterpretq_f32_u32(vshll_n_u16(x, 16)); }

inline uint16x4_t to_16_bits(float32x4_t x, F16) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }
inline uint16x4_t to_16_bits(float32x4_t x, BF16) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x), high = vshrq_n_u32(bits, 16);
    const uint32x4_t half = vaddq_u32(vandq_u32(high, vdupq_n_u32(1)), vdupq_n_u32(0x7fff));
    const uint16x4_t rounded = vshrn_n_u32(vaddq_u32(bits, half), 16);
    const uint16x4_t quiet = vorr_u16(vmovn_u32(high), vdup_n_u16(0x40));
    return vbsl_u16(vmovn_u32(vceqq_f32(x, x)), rounded, quiet);
}

inline float32x4_t load4(const float* x) { return vld1q_f32(x); }
template <class T>
inline float32x4_t load4(const T* x) { return widen(vld1_u16(words_of(x)), T{}); }

inline void store4(float* x, float32x4_t v) { vst1q_f32(x, v); }
template <class T>
inline void store4(T* x, float32x4_t v) { vst1_u16(words_of(x), to_16_bits(v, T{})); }

// The largest abs_bits of n elements, a multiple of 32. Two chains: a maximum has the latency of 2 or 3 of them.
inline uint32_t max_abs_bits(const float* w, int64_t n) {
    const uint32x4_t magnitude = vdupq_n_u32(0x7fffffff);
    uint32x4_t a = vdupq_n_u32(0), b = a;
    for (int64_t i = 0; i < n; i += 8) {
        a = vmaxq_u32(a, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(w + i)), magnitude));
        b = vmaxq_u32(b, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(w + i + 4)), magnitude));
    }
    return vmaxvq_u32(vmaxq_u32(a, b));
}

// T has 16 bits.
template <class T>
inline uint32_t max_abs_bits(const T* w, int64_t n) {
    const uint16x8_t magnitude = vdupq_n_u16(0x7fff);
    uint16x8_t a = vdupq_n_u16(0), b = a;
    for (int64_t i = 0; i < n; i += 16) {
        a = vmaxq_u16(a, vandq_u16(vld1q_u16(words_of(w + i)), magnitude));
        b = vmaxq_u16(b, vandq_u16(vld1q_u16(words_of(w + i + 8)), magnitude));
    }
    return vmaxvq_u16(vmaxq_u16(a, b));
}

}  // namespace
}  // namespace lora_ops
