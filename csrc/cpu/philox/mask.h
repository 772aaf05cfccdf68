// What each instruction set provides of dropout masks.
#pragma once

#include <stdint.h>

namespace lora_ops {

// The mask of some rows, whole: bits [rows, ceil(k / 8)].
using DropoutMask = void (*)(uint64_t seed, uint32_t offset, uint32_t threshold, int64_t first_row, int64_t rows,
                             int64_t k, uint8_t* bits);
extern const DropoutMask kPortableDropoutMask, kAvx2DropoutMask, kAvx512DropoutMask, kNeonDropoutMask;

}  // namespace lora_ops
