// What each instruction set provides of the NF4 codec: serial kernels, for every dtype.
#pragma once

#include <stdint.h>

#include "lora_ops.h"

namespace lora_ops {

// A tile of a transposed W: a cache line of codes wide, and as high as a line of the transpose is long.
constexpr int64_t kNF4TileColumns = 128, kNF4TileBytes = 64;

struct NF4Kernels {
    // Quantizers return false when the input holds inf or NaN. Pointers are at the start of a block.
    bool (*quantize)(const void* w, lora_ops_dtype dtype, int64_t n, int64_t block_size, uint8_t* packed, float* absmax);
    void (*dequantize)(const lora_ops_nf4_weight& w, int64_t begin, int64_t end, void* out, lora_ops_dtype dtype);
    // Tiles [begin, end) of W [n, k] -> out [k, n].
    void (*dequantize_transposed)(const lora_ops_nf4_weight& w, int64_t n, int64_t k, int64_t begin, int64_t end,
                                  void* out, lora_ops_dtype dtype);
    // Elements [begin, end) of W [n, k] from w [k, n]; rows has room for a band of them.
    bool (*quantize_transposed)(const void* w, lora_ops_dtype dtype, int64_t n, int64_t k, int64_t begin, int64_t end,
                                int64_t block_size, uint8_t* packed, float* absmax, void* rows);
};

extern const NF4Kernels kPortableNF4, kAvx2NF4, kAvx512NF4, kNeonNF4;

}  // namespace lora_ops
