// NF4 quantize and dequantize, written once for every instruction set.
//
// Vec supplies the parts that differ, each on 32 elements (16 packed bytes) of type T:
//   uint32_t max_abs_bits<T>(const T* w, int64_t n)                 n a multiple of 32
//   void encode32<T>(const T* w, float scale, uint8_t* packed)      code of w * scale
//   Table<T>(float absmax)                                          the 16 values code * absmax, rounded to T
//   void decode32<T>(const Table<T>&, const uint8_t* packed, T* out)
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/scalar.h"
#include "nf4/table.h"

namespace lora_ops {
namespace {

inline int nf4_encode(float v) {
    int code = 0;
    for (int i = 0; i < 15; ++i) code += v > nf4_threshold(i);
    return code;
}

// The last block when it is not full divides by absmax instead of multiplying by the reciprocal, and stores
// absmax as clamped: bitsandbytes' bytes depend on both.
template <class T>
uint32_t nf4_quantize_partial(const T* w, int64_t n, uint8_t* packed, float* absmax) {
    const uint32_t bits = largest_abs_bits(w, n);
    *absmax = at_least(to_float(from_abs_bits<T>(bits)), kLeastAbsmax);
    for (int64_t i = 0; i < n; i += 2) {
        const int even = nf4_encode(to_float(w[i]) / *absmax);
        const int odd = i + 1 < n ? nf4_encode(to_float(w[i + 1]) / *absmax) : kNF4CodeOfZero;
        packed[i / 2] = static_cast<uint8_t>(even << 4 | odd);
    }
    return bits;
}

template <class Vec, class T>
bool nf4_quantize(const T* w, int64_t n, int64_t block_size, uint8_t* packed, float* absmax) {
    uint32_t largest = 0;
    for (; n >= block_size; n -= block_size) {
        const uint32_t bits = Vec::template max_abs_bits<T>(w, block_size);
        largest = largest < bits ? bits : largest;
        *absmax = to_float(from_abs_bits<T>(bits));
        const float scale = 1.0f / at_least(*absmax, kLeastAbsmax);
        for (int64_t i = 0; i < block_size; i += 32) Vec::template encode32<T>(w + i, scale, packed + i / 2);
        w += block_size;
        packed += block_size / 2;
        ++absmax;
    }
    if (n > 0) {
        const uint32_t bits = nf4_quantize_partial(w, n, packed, absmax);
        largest = largest < bits ? bits : largest;
    }
    return largest < kInfBits<T>;
}

inline float nf4_absmax(const lora_ops_nf4_weight& w, int64_t block) {
    if (w.absmax) return w.absmax[block];
    return w.absmax_map[w.absmax_codes[block]] * w.nested_absmax[block / 256] + w.nested_offset;
}

// The scales of n groups of 64 elements from element `first` on; blocks and `first` are multiples of 64. Blocks are
// counted, not divided for: a division takes as long as decoding 64 elements.
inline void scales_of_64(const lora_ops_nf4_weight& w, int64_t first, int64_t n, float* scales) {
    const int64_t groups = w.block_size / 64;  // of a block
    int64_t block = first / w.block_size;
    if (groups == 1 && w.absmax) {
        memcpy(scales, w.absmax + block, sizeof(float) * n);
        return;
    }
    if (groups == 1) {
        for (int64_t i = 0; i < n; ++i) scales[i] = nf4_absmax(w, block + i);
        return;
    }
    int64_t left = groups - first % w.block_size / 64;
    for (int64_t i = 0; i < n; ++block, left = groups) {
        const float scale = nf4_absmax(w, block);
        for (const int64_t end = lesser(i + left, n); i < end; ++i) scales[i] = scale;
    }
}

template <class T>
T nf4_decode_one(const uint8_t* packed, int64_t i, float absmax) {
    return round_to<T>(kNF4Code[packed[i / 2] >> (i % 2 ? 0 : 4) & 15] * absmax);
}

// Elements [begin, end), the first of them in `block`. Blocks are counted: to divide for each takes as long as to decode 64
// elements.
template <class Vec, class T>
void nf4_dequantize(const lora_ops_nf4_weight& w, int64_t block, int64_t begin, int64_t end, T* out) {
    out -= begin;  // out[i] is element i from here on
    for (int64_t i = begin; i < end; ++block) {
        const int64_t block_end = (block + 1) * w.block_size < end ? (block + 1) * w.block_size : end;
        const float absmax = nf4_absmax(w, block);
        if (i % 2) {
            out[i] = nf4_decode_one<T>(w.packed, i, absmax);
            ++i;
        }
        if (i + 32 <= block_end) {
            const typename Vec::template Table<T> table(absmax);
            for (; i + 32 <= block_end; i += 32) Vec::template decode32<T>(table, w.packed + i / 2, out + i);
        }
        for (; i < block_end; ++i) out[i] = nf4_decode_one<T>(w.packed, i, absmax);
    }
}

}  // namespace
}  // namespace lora_ops
