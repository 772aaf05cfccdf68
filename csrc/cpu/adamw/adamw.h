// What each instruction set provides of AdamW, and what its steps in memory and over pages share.
#pragma once

#include <stdint.h>

#include "blockwise8/code.h"
#include "lora_ops.h"

namespace lora_ops {

constexpr int64_t kAdamwBlock = 256;  // elements that share an absmax, and that are worked on at a time

// The codes of 8-bit states.
struct AdamwCodes {
    const Blockwise8Code *exp_avg, *exp_avg_sq;
};

// Updates elements [begin, end) of a slice, with its row of constants; begin is a multiple of kAdamwBlock.
using AdamwKernel = void (*)(const lora_ops_adamw_slice& s, int64_t begin, int64_t end, const float* row,
                             const AdamwCodes& codes, const uint64_t* seed);
extern const AdamwKernel kPortableAdamw, kAvx2Adamw, kAvx512Adamw, kAvx512Bf16Adamw, kNeonAdamw;

AdamwKernel adamw_kernel();  // of the instruction set in use
bool is_valid(const lora_ops_adamw_slice& s, int64_t rows);
bool are_maps(const float* signed_map, const float* unsigned_map);

}  // namespace lora_ops
