// The instruction set in use. Kernels are compiled once for each, in files named after it; the rest runs everywhere.
#pragma once

#include "lora_ops.h"

namespace lora_ops {

int current_isa();

// Of an op's kernels for every instruction set, those for the one in use. Of the others' only the names need be there.
template <const auto& kPortable, const auto& kAvx2, const auto& kAvx512, const auto& kAvx512Bf16, const auto& kNeon,
          const auto& kNeonBf16>
const auto& for_current_isa() {
#if defined(LORA_OPS_X86)
    switch (current_isa()) {
        case LORA_OPS_ISA_AVX2: return kAvx2;
        case LORA_OPS_ISA_AVX512: return kAvx512;
        case LORA_OPS_ISA_AVX512_BF16: return kAvx512Bf16;
    }
#elif defined(LORA_OPS_ARM64)
    switch (current_isa()) {
        case LORA_OPS_ISA_NEON: return kNeon;
        case LORA_OPS_ISA_NEON_BF16: return kNeonBf16;
    }
#endif
    return kPortable;
}

}  // namespace lora_ops
