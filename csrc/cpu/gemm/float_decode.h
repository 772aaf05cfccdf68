// W in fp32, for products in fp32 multiply-adds with activations of type T; written once for every instruction set. An NF4
// weight is code * absmax rounded to T, as dense torch holds it, and widened.
//
// V supplies vectors of kLanes floats of type F and what the blocking needs to know:
//   Codec, table<T>(absmax)            of nf4/codec.h, and a Table<float> of values rounded to T
//   kGroups                            whether decode64<T>(packed, absmax, float* out) decodes 64 elements of a block
//   kRows, kVectors                    the tile of the micro-kernel
//   F zero(), set1(float), load(const T*), fma(a, b, c); store(float* or T*, F); float sum(F)
//   transpose(const float* const rows[kLanes], int64_t at, float* out, int64_t stride)
#pragma once

#include <string.h>

#include "common/scalar.h"
#include "gemm/gemm.h"
#include "nf4/codec.h"

namespace lora_ops {
namespace {

// Decodes elements [begin, begin + n) and up to 31 before and after them, aligned to 32. Element begin is at the returned
// address. out has room for n + 62.
template <class V, class T>
const float* decode_floats(const Gemm& g, int64_t begin, int64_t n, float* out) {
    const int64_t first = begin / 32 * 32, last = begin + n;
    const int64_t n_bytes = (g.n * g.k + 1) / 2;
    int64_t block = first / g.w.block_size;
    for (int64_t i = first; i < last; ++block) {
        const int64_t block_end = lesser((block + 1) * g.w.block_size, last);
        const float absmax = nf4_absmax(g.w, block);
        if constexpr (V::kGroups) {
            for (; i + 64 <= block_end; i += 64) V::template decode64<T>(g.w.packed + i / 2, absmax, out + i - first);
            if (i == block_end) continue;
        }
        const auto table = V::template table<T>(absmax);
        for (; i < block_end; i += 32) {
            if (n_bytes - i / 2 >= 16) {
                V::Codec::template decode32<float>(table, g.w.packed + i / 2, out + i - first);
            } else {  // the tensor ends here
                uint8_t bytes[16] = {};
                memcpy(bytes, g.w.packed + i / 2, static_cast<size_t>(n_bytes - i / 2));
                V::Codec::template decode32<float>(table, bytes, out + i - first);
            }
        }
    }
    return out + (begin - first);
}

template <class V, class T>
void widen_floats(const T* from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + V::kLanes <= n; i += V::kLanes) V::store(to + i, V::load(from + i));
    for (; i < n; ++i) to[i] = to_float(from[i]);
}

// Elements [column, column + n) of a row of W, in out or where they stand; out has room for n + 62.
template <class V, class T>
const float* row_floats(const Gemm& g, int64_t row, int64_t column, int64_t n, float* out) {
    if (!g.dense) return decode_floats<V, T>(g, row * g.k + column, n, out);
    const T* const from = static_cast<const T*>(g.dense) + row * g.stride_dense + column;
    if constexpr (sizeof(T) == sizeof(float)) return from;
    widen_floats<V>(from, n, out);
    return out;
}

}  // namespace
}  // namespace lora_ops
