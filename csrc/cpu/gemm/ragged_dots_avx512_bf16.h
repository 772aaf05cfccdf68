// y for a few rows of x and any K and block size: products along K with one row of W.
#pragma once

#include "gemm/decode_avx512_bf16.h"
#include "gemm/dot_sums_avx512_bf16.h"

namespace lora_ops {
namespace {

constexpr int kMostRaggedRows = 4;  // 8 rows of 4095 x 4097 take 3.1 ms, 1.8 as wide dots

// W by 32 elements that are aligned in it but not in x.
template <int m>
void ragged_dots(const Gemm& g, int64_t column) {
    __m512 sum[m][1];
    for (int i = 0; i < m; ++i) sum[i][0] = _mm512_setzero_ps();
    const BF16* const x = static_cast<const BF16*>(g.x);
    const int64_t begin = column * g.k, end = begin + g.k, n_bytes = (g.n * g.k + 1) / 2;
    int64_t i = begin / 32 * 32, block = i / g.w.block_size, block_end = block * g.w.block_size;
    const auto add = [&](__m512i w, int j, __m512i x_j) {
        sum[j][0] = _mm512_dpbf16_ps(sum[j][0], as_bf16(x_j), as_bf16(w));
    };
    for (; i < end; ++block) {
        block_end += g.w.block_size;
        const __m512i table = bf16_table(nf4_absmax(g.w, block));
        for (; i < lesser(block_end, end); i += 32) {
            const BF16* const from = x + (i - begin);
            if (i >= begin && i + 32 <= end) {
                const __m512i w = decode32(table, g.w.packed + i / 2);
                for (int j = 0; j < m; ++j) add(w, j, _mm512_loadu_si512(from + j * g.stride_x));
                continue;
            }
            __mmask32 mask = ~__mmask32{0};  // of the elements of this row
            if (i < begin) mask = mask << (begin - i);
            if (end - i < 32) mask &= (__mmask32{1} << (end - i)) - 1;
            const __m512i w = _mm512_maskz_mov_epi16(mask, decode32(table, g.w.packed + i / 2, n_bytes - i / 2));
            for (int j = 0; j < m; ++j) add(w, j, _mm512_maskz_loadu_epi16(mask, from + j * g.stride_x));
        }
    }
    if (g.low_rank) add_low_rank_dots(*g.low_rank, 0, column, 0, sum);
    write_dots<m, 1>(g, 0, column, 0, dots(sum));
}

template <int m>
void ragged_dots_of_task(const Gemm& g, int64_t task) {
    const int64_t end = lesser((task + 1) * kDotColumns, g.n);
    for (int64_t column = task * kDotColumns; column < end; ++column) ragged_dots<m>(g, column);
}

inline bool serves_ragged_dots(const Gemm& g) {
    return g.dtype == LORA_OPS_BF16 && !g.dx && !g.dense && g.m <= kMostRaggedRows;
}

inline GemmPlan plan_ragged_dots(const Gemm& g, int) {
    GemmPlan plan = {};
    plan.tasks = ceil_div(g.n, kDotColumns);
    return plan;
}

inline void ragged_dots_task(const Gemm& g, const GemmPlan&, int64_t task, const char*, char*) {
    switch (g.m) {
        case 1: return ragged_dots_of_task<1>(g, task);
        case 2: return ragged_dots_of_task<2>(g, task);
        case 3: return ragged_dots_of_task<3>(g, task);
        case 4: return ragged_dots_of_task<4>(g, task);
    }
}

}  // namespace
}  // namespace lora_ops
