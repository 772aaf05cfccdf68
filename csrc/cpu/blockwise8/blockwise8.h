// What each instruction set provides of 8-bit blockwise codes: serial kernels.
#pragma once

#include "blockwise8/code.h"

namespace lora_ops {

struct Blockwise8Kernels {
    // false when the input holds inf or NaN.
    bool (*quantize)(const float* x, int64_t n, int64_t block_size, const Blockwise8Code& code, uint8_t* codes,
                     float* absmax);
    void (*dequantize)(const uint8_t* codes, const float* absmax, int64_t n, int64_t block_size,
                       const Blockwise8Code& code, float* out);
};

extern const Blockwise8Kernels kPortableBlockwise8, kAvx2Blockwise8, kAvx512Blockwise8, kAvx512Bf16Blockwise8,
    kNeonBlockwise8;

}  // namespace lora_ops
