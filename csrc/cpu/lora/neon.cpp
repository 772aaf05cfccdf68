// NEON.
#include "isa/neon.h"
#include "lora/entry.h"
#include "philox/neon.h"

namespace lora_ops {
namespace {

// 4 bits, from the lowest on, as lanes of ones or zeros.
inline uint32x4_t lanes_of(unsigned bits) {
    const uint32_t kEach[4] = {1, 2, 4, 8};
    return vtstq_u32(vdupq_n_u32(bits), vld1q_u32(kEach));
}

struct Neon {
    using F = float32x4_t;
    using Mask = NeonMask;
    static constexpr int kWidth = 4, kPair = 1, kRows = 4;  // with 2, 8 % more instructions

    static F zero() { return vdupq_n_f32(0); }
    static F load(const float* p) { return vld1q_f32(p); }
    static F load(const uint32_t* p) { return vreinterpretq_f32_u32(vld1q_u32(p)); }
    static void store(float* p, F v) { vst1q_f32(p, v); }
    static F broadcast(const uint32_t* p) { return vreinterpretq_f32_u32(vld1q_dup_u32(p)); }
    static F multiply_add(F sum, F a, F b) { return vfmaq_f32(sum, a, b); }

    template <class T>
    static void pack_row(const T* x, int64_t n, const uint8_t* bits, uint32_t* out, int64_t width) {
        int64_t c = 0;
        for (; c + 4 <= n; c += 4) {
            const uint32x4_t v = vreinterpretq_u32_f32(load4(x + c));
            vst1q_u32(out + c, bits ? vandq_u32(v, lanes_of(bits[c / 8] >> c % 8)) : v);
        }
        for (; c < n; ++c) out[c] = is_kept(bits, c) ? float_bits(to_float(x[c])) : 0;
        for (; c < width; ++c) out[c] = 0;
    }

    template <int J, class T>
    static void add_row(T* y, const F (&sums)[J], const uint8_t* bits) {
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) {
            const F old = load4(y + 4 * j), sum = vaddq_f32(old, sums[j]);
            store4(y + 4 * j, bits ? vbslq_f32(lanes_of(bits[j / 2] >> j % 2 * 4), sum, old) : sum);
        }
    }
};

}  // namespace

const LoraKernels kNeonLora = Entry<Neon, Neon>::kernels();

}  // namespace lora_ops
