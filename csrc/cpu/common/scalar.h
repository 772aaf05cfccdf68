// Element types and their conversions, bit for bit what IEEE 754 (and torch) do, without hardware help but where every
// machine of an architecture has it.
//
// Everything here is in an unnamed namespace: each translation unit is compiled for its own instruction set, and
// a shared inline function could be linked in its AVX-512 form into code that must run everywhere.
#pragma once

#include <stdint.h>
#include <string.h>

#include "lora_ops.h"

namespace lora_ops {
namespace {

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct F16 {
    uint16_t bits;
};
struct BF16 {
    uint16_t bits;
};

inline uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// The reciprocal of a smaller absmax could overflow. bitsandbytes uses the same bound.
constexpr float kLeastAbsmax = 1e-38f;

inline float at_least(float x, float least) { return x < least ? least : x; }

// |x| as an unsigned integer: ordered like |x|, with inf and NaN above every finite value.
inline uint32_t abs_bits(float x) { return float_bits(x) & 0x7fffffffu; }
inline uint32_t abs_bits(F16 x) { return x.bits & 0x7fffu; }
inline uint32_t abs_bits(BF16 x) { return x.bits & 0x7fffu; }

template <class T>
constexpr uint32_t kInfBits = 0;
template <>
constexpr uint32_t kInfBits<float> = 0x7f800000u;
template <>
constexpr uint32_t kInfBits<F16> = 0x7c00u;
template <>
constexpr uint32_t kInfBits<BF16> = 0x7f80u;

// The largest abs_bits of n elements.
template <class T>
inline uint32_t largest_abs_bits(const T* x, int64_t n) {
    uint32_t bits = 0;
    for (int64_t i = 0; i < n; ++i) bits = bits < abs_bits(x[i]) ? abs_bits(x[i]) : bits;
    return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(BF16 x) { return bits_float(uint32_t{x.bits} << 16); }
#if defined(LORA_OPS_ARM64)
inline float to_float(F16 x) {
    __fp16 half;
    memcpy(&half, &x, sizeof half);
    return half;
}
#else
inline float to_float(F16 x) {
    const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
    const uint32_t magnitude = x.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude < 0x0400u) {  // subnormal: magnitude * 2^-24, exact
        return bits_float(sign | float_bits(static_cast<float>(magnitude) * 0x1p-24f));
    }
    return bits_float(sign | ((magnitude << 13) + (112u << 23)));
}
#endif

template <class T>
inline T from_abs_bits(uint32_t bits);
template <>
inline float from_abs_bits<float>(uint32_t bits) { return bits_float(bits); }
template <>
inline F16 from_abs_bits<F16>(uint32_t bits) { return F16{static_cast<uint16_t>(bits)}; }
template <>
inline BF16 from_abs_bits<BF16>(uint32_t bits) { return BF16{static_cast<uint16_t>(bits)}; }

// Rounds to nearest even; a NaN stays a NaN and is made quiet.
template <class T>
inline T round_to(float x);
template <>
inline float round_to<float>(float x) { return x; }
template <>
inline BF16 round_to<BF16>(float x) {
    const uint32_t bits = float_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return BF16{static_cast<uint16_t>(bits >> 16 | 0x40u)};
    return BF16{static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
inline F16 round_to<F16>(float x) {
#if defined(LORA_OPS_ARM64)
    const __fp16 half = static_cast<__fp16>(x);
    F16 rounded;
    memcpy(&rounded, &half, sizeof half);
    return rounded;
#else
    const uint32_t bits = float_bits(x);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
    } else if (magnitude >= 0x477ff000u) {  // 65520 and above: rounds to inf
        half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {
        // Below 2^-14 the spacing is 2^-24, which is the spacing of fp32 at 0.5: the addition does the rounding.
        half = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
    } else {
        half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    }
    return F16{static_cast<uint16_t>(sign | half)};
#endif
}

// Calls work with an element of the type that dtype names.
template <class Work>
inline auto with_dtype(int64_t dtype, Work work) {
    if (dtype == LORA_OPS_F32) return work(float{});
    if (dtype == LORA_OPS_F16) return work(F16{});
    return work(BF16{});
}

}  // namespace
}  // namespace lora_ops
