// How dots end: 16 sums of each product become one, with the low-rank update before and the bias after.
#pragma once

#include <immintrin.h>

#include "gemm/gemm.h"
#include "isa/avx512_bf16.h"

namespace lora_ops {
namespace {

constexpr int64_t kDotColumns = 64;  // rows of W in a task

// Elements [k, k + 32) of a row of lora_b as bfloat16, zeros beyond its end.
inline __m512i low_rank_vector(const LowRank& low, int64_t row, int64_t k) {
    const int64_t at = row * low.r + k;
    const __mmask32 inside = first32(low.r - k);
    return with_dtype(low.factor_dtype, [&](auto type) {
        return load32(static_cast<const decltype(type)*>(low.factor) + at, inside);
    });
}

// Adds the low-rank update of rows first + i, i < m, and columns column + r * apart, r < rows.
template <int m, int rows>
void add_low_rank_dots(const LowRank& low, int64_t first, int64_t column, int64_t apart, __m512 (&sum)[m][rows]) {
    const BF16* const s = static_cast<const BF16*>(low.s) + first * low.stride_s;
    for (int64_t k = 0; k < low.r; k += 32) {
        for (int r = 0; r < rows; ++r) {
            const __m512bh b_r = as_bf16(low_rank_vector(low, column + r * apart, k));
            for (int i = 0; i < m; ++i) {
                const __m512bh s_i = as_bf16(_mm512_loadu_si512(s + i * low.stride_s + k));
                sum[i][r] = _mm512_dpbf16_ps(sum[i][r], s_i, b_r);
            }
        }
    }
}

// The sums of the lanes of 16 vectors, in order.
inline __m512 sums_of_lanes(__m512 (&v)[16]) {
    for (int i = 0; i < 8; ++i) {
        v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    }
    for (int i = 0; i < 4; ++i) {  // after this each 128 bits hold a sum of each of 4 vectors
        const __m512d a = _mm512_castps_pd(v[2 * i]), b = _mm512_castps_pd(v[2 * i + 1]);
        v[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int n = 2; n > 0; n /= 2) {
        for (int i = 0; i < n; ++i) {
            const __m512 a = v[2 * i], b = v[2 * i + 1];
            v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
        }
    }
    return v[0];
}

// Of sum[i][r], in lane i * rows + r.
template <int m, int rows>
__m512 dots(const __m512 (&sum)[m][rows]) {
    static_assert(m * rows <= 16, "one vector");
    __m512 lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = i < m * rows ? sum[i / rows][i % rows] : _mm512_setzero_ps();
    return sums_of_lanes(lanes);
}

// Columns column + r * apart, r < rows, of rows first + i, i < m.
template <int m, int rows>
void write_dots(const Gemm& g, int64_t first, int64_t column, int64_t apart, __m512 dots) {
    alignas(64) float bias[16] = {};
    if (g.bias) {
        for (int i = 0; i < m * rows; ++i) {
            bias[i] = to_float(static_cast<const BF16*>(g.bias)[column + i % rows * apart]);
        }
    }
    alignas(32) BF16 y[16];
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_add_ps(dots, _mm512_load_ps(bias)));
    _mm256_store_si256(reinterpret_cast<__m256i*>(y), reinterpret_cast<__m256i>(rounded));
    BF16* const to = static_cast<BF16*>(g.y) + first * g.stride_y + column;
    for (int i = 0; i < m * rows; ++i) to[i / rows * g.stride_y + i % rows * apart] = y[i];
}

}  // namespace
}  // namespace lora_ops
