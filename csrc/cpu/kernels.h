// What each instruction set provides: serial kernels. dispatch.cpp picks a set and splits the work over threads.
#pragma once

#include <stdint.h>

#include "lora_ops.h"

namespace lora_ops {

// Finds the nearest of 256 ascending values. |v| <= 1 falls in a bin by its sign, exponent and 7 bits of mantissa
// (everything below 2^-23 in one); start[bin] counts the thresholds below the whole bin, and the search goes on
// from there. Both dynamic maps have at most one threshold a bin, so one comparison settles it.
struct Blockwise8Search {
    static constexpr int kFirstKey = (127 - 23) << 7;
    static constexpr int kBins = (127 << 7) - kFirstKey + 1;

    float threshold[256];      // threshold[i]: largest fp32 <= midpoint of values i and i + 1; the last is +inf
    int most_steps;            // comparisons that settle any v
    uint8_t start[2 * kBins];  // bins of positive v, then of negative v
    uint8_t padding[3];        // a vector gather reads 4 bytes at each start
};

// The maps of AdamW's 8-bit states with their searches.
struct AdamwCodes {
    const float *signed_map, *unsigned_map;
    const Blockwise8Search *signed_search, *unsigned_search;
};

struct Kernels {
    // Quantizers return false when the input holds inf or NaN. Pointers are at the start of a block.
    bool (*nf4_quantize)(const void* w, lora_ops_dtype dtype, int64_t n, int64_t block_size, uint8_t* packed,
                         float* absmax);
    void (*nf4_dequantize)(const lora_ops_nf4_weight& w, int64_t begin, int64_t end, void* out, lora_ops_dtype dtype);
    bool (*blockwise8_quantize)(const float* x, int64_t n, int64_t block_size, const Blockwise8Search& search,
                                uint8_t* codes, float* absmax);
    void (*blockwise8_dequantize)(const uint8_t* codes, const float* absmax, int64_t n, int64_t block_size,
                                  const float* map, float* out);
    void (*adamw)(const lora_ops_adamw_slice& s, int64_t begin, int64_t end, const float* row, const AdamwCodes& codes,
                  const uint64_t* seed);
};

extern const Kernels kPortableKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

}  // namespace lora_ops
