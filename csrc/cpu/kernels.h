// What each instruction set provides: serial kernels. dispatch.cpp picks a set and splits the work over threads.
#pragma once

#include <stdint.h>

#include <memory>

#include "lora_ops.h"

namespace lora_ops {

// 256 ascending values, and what finds the nearest of them to a v, |v| <= 1: the number of thresholds below v.
//
// Any map: v falls in a bin by its sign, exponent and 7 bits of mantissa (everything below 2^-23 in one); start[bin]
// counts the thresholds below the whole bin, and the search goes on from there. Both dynamic maps have at most one
// threshold a bin, so one comparison settles it.
//
// The dynamic maps: each decade is a straight line, and no binade meets more than two of them. So in the bin of 8 bits of
// mantissa that holds |v|, the number of thresholds below |v| is the integer part of one of two lines, or one more, which
// one comparison settles. Lines are by exponent, 16-bit fixed point. Values are compared as the integers 2 |v| + (v < 0),
// in which a byte is the exponent, and whose lowest bit tells apart what the same midpoint decides of v and of -v.
struct Blockwise8Code {
    static constexpr int kFirstKey = (127 - 23) << 7;
    static constexpr int kBins = (127 << 7) - kFirstKey + 1;
    static constexpr int kFirstExponent = 127 - 31;  // biased; the lowest of 32, in whose first bin smaller values fall

    alignas(64) float map[256];
    alignas(64) float threshold[256];         // largest fp32 <= midpoint of values i and i + 1; the last is +inf
    alignas(64) uint8_t map_bytes[4][256];    // byte i of each value: a permute of bytes looks up 64 codes at once
    // Of the positive values, what 2 |v| + (v < 0) has to exceed. That of code 127, if the map is signed, is the last: the
    // other 128 are then found by 7 bits of a code.
    alignas(64) uint32_t doubled[256];
    alignas(64) uint8_t doubled_bytes[4][256];
    alignas(64) uint16_t bend[32];     // fraction << 8 | exponent of the last bin of a binade that the first line serves
    alignas(64) uint16_t rise[2][32];  // second and first line's, over a binade, in 1 / 256; by the exponent's low 5 bits
    alignas(64) uint16_t base[2][32];  // their codes where the binade begins
    // linear: the lines were found to serve this map in every bin, and if it is signed, it is that of positive values
    // mirrored, with 0 as code 127 and one value more at the end.
    bool is_signed, linear;
    int most_steps;            // comparisons that settle any v
    uint8_t start[2 * kBins];  // bins of positive v, then of negative v
    uint8_t padding[3];        // a vector gather reads 4 bytes at each start
};

// A tile of a transposed W: a cache line of codes wide, and as high as a line of the transpose is long.
constexpr int64_t kNF4TileColumns = 128, kNF4TileBytes = 64;

struct Kernels {
    // Quantizers return false when the input holds inf or NaN. Pointers are at the start of a block.
    bool (*nf4_quantize)(const void* w, lora_ops_dtype dtype, int64_t n, int64_t block_size, uint8_t* packed,
                         float* absmax);
    void (*nf4_dequantize)(const lora_ops_nf4_weight& w, int64_t begin, int64_t end, void* out, lora_ops_dtype dtype);
    // Tiles [begin, end) of W [n, k] -> out [k, n].
    void (*nf4_dequantize_transposed)(const lora_ops_nf4_weight& w, int64_t n, int64_t k, int64_t begin, int64_t end,
                                      void* out, lora_ops_dtype dtype);
    // Elements [begin, end) of W [n, k] from w [k, n]; rows has room for a band of them.
    bool (*nf4_quantize_transposed)(const void* w, lora_ops_dtype dtype, int64_t n, int64_t k, int64_t begin, int64_t end,
                                    int64_t block_size, uint8_t* packed, float* absmax, void* rows);
    void (*checksum_rows)(uint64_t* lanes, const char* data, int64_t rows);
};

// The codes of AdamW's 8-bit states.
struct AdamwCodes {
    const Blockwise8Code *exp_avg, *exp_avg_sq;
};

struct Blockwise8Kernels {
    // false when the input holds inf or NaN.
    bool (*quantize)(const float* x, int64_t n, int64_t block_size, const Blockwise8Code& code, uint8_t* codes,
                     float* absmax);
    void (*dequantize)(const uint8_t* codes, const float* absmax, int64_t n, int64_t block_size,
                       const Blockwise8Code& code, float* out);
    void (*adamw)(const lora_ops_adamw_slice& s, int64_t begin, int64_t end, const float* row, const AdamwCodes& codes,
                  const uint64_t* seed);
};

extern const Kernels kPortableKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Blockwise8Kernels kPortableBlockwise8;
extern const Blockwise8Kernels kAvx2Blockwise8;
extern const Blockwise8Kernels kAvx512Blockwise8;
extern const Blockwise8Kernels kAvx512VbmiBlockwise8;

// In dispatch.cpp: the kernels of the instruction set in use, the code of a map, and whether a slice can be worked on.
const Blockwise8Kernels& blockwise8_kernels();
std::shared_ptr<const Blockwise8Code> code_of(const float* map);
bool is_valid(const lora_ops_adamw_slice& s, int64_t rows);

}  // namespace lora_ops
