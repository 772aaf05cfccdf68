// Routes with NEON.
#include "gemm/float_dots.h"
#include "gemm/float_panels.h"
#include "isa/neon.h"
#include "nf4/neon.h"

namespace lora_ops {
namespace {

struct NeonFloats {
    using F = float32x4_t;
    using Codec = NeonNF4;
    static constexpr int kLanes = 4, kRows = 6, kVectors = 4;  // 24 accumulators, 4 + 1 operands of 32 registers
    static constexpr bool kGroups = false;

    template <class T>
    static NeonNF4::Table<float> table(float absmax) {
        NeonNF4::Table<float> table(absmax);
        if constexpr (sizeof(T) == 2) {
            float32x4_t value[4];
            for (int i = 0; i < 4; ++i) {
                value[i] = widen(to_16_bits(vmulq_n_f32(vld1q_f32(kNF4Code + 4 * i), absmax), T{}), T{});
            }
            table.set(value);
        }
        return table;
    }
    static F zero() { return vdupq_n_f32(0); }
    static F set1(float x) { return vdupq_n_f32(x); }
    static F add(F a, F b) { return vaddq_f32(a, b); }
    static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static float sum(F a) { return vaddvq_f32(a); }
    template <class T>
    static F load(const T* p) { return load4(p); }
    template <class T>
    static void store(T* p, F x) { store4(p, x); }

    // Columns [at, at + 4) of 4 rows -> rows of out.
    static void transpose(const float* const rows[4], int64_t at, float* out, int64_t stride) {
        float64x2_t r[4];  // low and high pairs of rows 0 and 2, then 1 and 3
        const F a = vld1q_f32(rows[0] + at), b = vld1q_f32(rows[1] + at);
        const F c = vld1q_f32(rows[2] + at), d = vld1q_f32(rows[3] + at);
        r[0] = vreinterpretq_f64_f32(vzip1q_f32(a, b));
        r[1] = vreinterpretq_f64_f32(vzip2q_f32(a, b));
        r[2] = vreinterpretq_f64_f32(vzip1q_f32(c, d));
        r[3] = vreinterpretq_f64_f32(vzip2q_f32(c, d));
        vst1q_f32(out, vreinterpretq_f32_f64(vzip1q_f64(r[0], r[2])));
        vst1q_f32(out + stride, vreinterpretq_f32_f64(vzip2q_f64(r[0], r[2])));
        vst1q_f32(out + 2 * stride, vreinterpretq_f32_f64(vzip1q_f64(r[1], r[3])));
        vst1q_f32(out + 3 * stride, vreinterpretq_f32_f64(vzip2q_f64(r[1], r[3])));
    }
};

}  // namespace

const GemmRoute kNeonDots = float_dots<NeonFloats>();
const GemmRoute kNeonPanels = float_panels<NeonFloats>();

}  // namespace lora_ops
