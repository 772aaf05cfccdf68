// The NF4 codec with NEON.
#include "nf4/neon.h"

#include "nf4/entry.h"

namespace lora_ops {
namespace {

struct NeonParts {
    using V = uint8x16_t;
    static constexpr int kParts = 1;
    static constexpr bool kStreams = false;
    static V load(const char* p, int64_t) { return vld1q_u8(reinterpret_cast<const uint8_t*>(p)); }
    static void store(char* p, V v) { vst1q_u8(reinterpret_cast<uint8_t*>(p), v); }
    template <class T>
    static V low(V a, V b) {
        if constexpr (sizeof(T) == 2) {
            return vreinterpretq_u8_u16(vzip1q_u16(vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b)));
        } else {
            return vreinterpretq_u8_u32(vzip1q_u32(vreinterpretq_u32_u8(a), vreinterpretq_u32_u8(b)));
        }
    }
    template <class T>
    static V high(V a, V b) {
        if constexpr (sizeof(T) == 2) {
            return vreinterpretq_u8_u16(vzip2q_u16(vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b)));
        } else {
            return vreinterpretq_u8_u32(vzip2q_u32(vreinterpretq_u32_u8(a), vreinterpretq_u32_u8(b)));
        }
    }
};

}  // namespace

const NF4Kernels kNeonNF4 = nf4_kernels<NeonNF4, NeonParts>();

}  // namespace lora_ops
