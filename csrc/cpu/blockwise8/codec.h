// 8-bit blockwise codes (arXiv 2110.02861), written once for every instruction set.
//
// Vec supplies the parts that differ, on n elements, n a multiple of 32:
//   uint32_t max_abs_bits(const float* x, int64_t n)
//   void encode8(const float* x, int64_t n, float scale, const Blockwise8Code&, uint8_t* codes)
//   void decode8(const uint8_t* codes, int64_t n, float scale, const Blockwise8Code&, float* out)
#pragma once

#include <stdint.h>

#include "blockwise8/code.h"
#include "common/scalar.h"

namespace lora_ops {
namespace {

constexpr uint32_t kOneBits = 0x3f800000u;

inline uint8_t blockwise8_encode(float x, const Blockwise8Code& code) {
    // Clamped to [-1, 1] as bits, which keeps even a NaN (the caller reports it) inside the bins.
    const uint32_t magnitude = abs_bits(x) < kOneBits ? abs_bits(x) : kOneBits;
    const uint32_t sign = float_bits(x) >> 31;
    const float v = bits_float(sign << 31 | magnitude);
    const int key = static_cast<int>(magnitude >> 16) - code.kFirstKey;
    int found = code.start[static_cast<int>(sign) * code.kBins + (key > 0 ? key : 0)];
    // No early exit: it would be a branch that the processor cannot predict.
    for (int step = 0; step < code.most_steps; ++step) found += v > code.threshold[found];
    return static_cast<uint8_t>(found);
}

template <class Vec>
bool blockwise8_quantize(const float* x, int64_t n, int64_t block_size, const Blockwise8Code& code, uint8_t* codes,
                         float* absmax) {
    uint32_t largest = 0;
    for (; n >= block_size; n -= block_size) {
        const int64_t vector_end = block_size / 32 * 32;
        uint32_t bits = Vec::max_abs_bits(x, vector_end);
        for (int64_t i = vector_end; i < block_size; ++i) bits = bits < abs_bits(x[i]) ? abs_bits(x[i]) : bits;
        largest = largest < bits ? bits : largest;
        *absmax = bits_float(bits);
        const float scale = 1.0f / at_least(*absmax, kLeastAbsmax);
        Vec::encode8(x, vector_end, scale, code, codes);
        for (int64_t i = vector_end; i < block_size; ++i) codes[i] = blockwise8_encode(x[i] * scale, code);
        x += block_size;
        codes += block_size;
        ++absmax;
    }
    if (n > 0) {  // as in NF4, the partial block divides
        const uint32_t bits = largest_abs_bits(x, n);
        largest = largest < bits ? bits : largest;
        *absmax = bits_float(bits);
        const float divisor = at_least(*absmax, kLeastAbsmax);
        for (int64_t i = 0; i < n; ++i) codes[i] = blockwise8_encode(x[i] / divisor, code);
    }
    return largest < kInfBits<float>;
}

// A gather is no faster than 16 loads (measured on Zen 5: 0.35 ns a value both), so this serves as decode8 as well.
inline void blockwise8_decode(const uint8_t* codes, int64_t n, float scale, const Blockwise8Code& code, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = code.map[codes[i]] * scale;
}

template <class Vec>
void blockwise8_dequantize(const uint8_t* codes, const float* absmax, int64_t n, int64_t block_size,
                           const Blockwise8Code& code, float* out) {
    for (; n > 0; n -= block_size) {
        const int64_t count = n < block_size ? n : block_size, vector_end = count / 32 * 32;
        Vec::decode8(codes, vector_end, *absmax, code, out);
        blockwise8_decode(codes + vector_end, count - vector_end, *absmax, code, out + vector_end);
        codes += block_size;
        out += block_size;
        ++absmax;
    }
}

}  // namespace
}  // namespace lora_ops
