// y for rows of x too few to pay for transposing W, where W is dense or ragged.
//
// Four rows of W are decoded to the L1 cache, kWideSpan elements of each, and multiplied with all rows of x, six at a
// time. Each product keeps 16 sums, which wait in memory between spans and meet at the end. Dense weights are used where
// they are. A low-rank update is one more span: rows of lora_b beside rows of scale S.
#pragma once

#include <string.h>

#include "gemm/blocks.h"
#include "gemm/decode_avx512_bf16.h"
#include "gemm/dot_sums_avx512_bf16.h"

namespace lora_ops {
namespace {

constexpr int64_t kWideSpan = 1024;
constexpr int64_t kWideAhead = 4096;   // bytes between a fetch and its use
constexpr int kWideW = 4, kWideX = 6;  // 24 accumulators, 4 rows of W, one of x

// Rows of x up to which this is faster than panels, which cost a transpose but multiply at full speed (this at 0.9 of
// it). Two Zen 4 cores, panels -> this: 12 rows over a dense 4096 x 4096 1.99 -> 1.66 ms; 32 rows over a ragged 4095 x
// 4097 4.8 -> 3.7.
inline int64_t most_wide_rows(const Gemm& g) { return g.dense ? 32 : is_aligned(g) ? 0 : 64; }

constexpr int64_t wide_stride(int64_t k) { return (k + 31) / 32 * 32; }

// What a thread has to itself.
struct WideScratch {
    static constexpr int64_t kRow = kWideSpan + 64, kRowsBytes = kWideW * kRow * int64_t{sizeof(uint16_t)};
    uint16_t* rows;  // [kWideW, kRow]
    float* sums;     // [m, kWideW, 16]
    explicit WideScratch(char* memory)
        : rows(reinterpret_cast<uint16_t*>(memory)), sums(reinterpret_cast<float*>(memory + kRowsBytes)) {}
    uint16_t* row(int r) const { return rows + r * kRow; }
    static int64_t bytes(int64_t m) { return kRowsBytes + (m * kWideW + 15) / 16 * 16 * 16 * int64_t{sizeof(float)}; }
};

using WideRows = const uint16_t* const (&)[kWideW];

// Rows of x: vector v of row i is step v + stride i elements behind x.
struct WideX {
    const BF16* x;
    int64_t step, stride;
};

// sums [rows, kWideW, 16] (+)= the products of x [rows, n] and w [kWideW, n], n in vectors of 32.
template <int rows>
void wide_tile(WideRows w, const BF16* x, int64_t step, int64_t stride, int64_t vectors, bool first, float* sums) {
    __m512 sum[rows][kWideW];
    for (int i = 0; i < rows; ++i) {
        for (int r = 0; r < kWideW; ++r) {
            sum[i][r] = first ? _mm512_setzero_ps() : _mm512_load_ps(sums + (i * kWideW + r) * 16);
        }
    }
    for (int64_t v = 0; v < vectors; ++v) {
        __m512bh w_v[kWideW];
        for (int r = 0; r < kWideW; ++r) w_v[r] = as_bf16(_mm512_loadu_si512(w[r] + 32 * v));
        for (int i = 0; i < rows; ++i) {
            const __m512bh x_i = as_bf16(_mm512_loadu_si512(x + v * step + i * stride));
            for (int r = 0; r < kWideW; ++r) sum[i][r] = _mm512_dpbf16_ps(sum[i][r], x_i, w_v[r]);
        }
    }
    for (int i = 0; i < rows; ++i) {
        for (int r = 0; r < kWideW; ++r) _mm512_store_ps(sums + (i * kWideW + r) * 16, sum[i][r]);
    }
}

// x [m, K] in the order in which tiles read it: a vector of each row, side by side; zeros up to a multiple of 32.
inline void pack_wide(const Gemm& g, BF16* to) {
    row_tiles(g.m, kWideX, [&](int64_t first, int64_t rows) {
        for (int64_t k = 0; k < g.k; k += 32) {
            for (int64_t i = 0; i < rows; ++i, to += 32) {
                const BF16* const from = static_cast<const BF16*>(g.x) + (first + i) * g.stride_x + k;
                _mm512_store_si512(to, load32(from, first32(g.k - k)));
            }
        }
    });
}

// place(first row, rows) tells where those of x are.
template <class Place>
inline void wide_products(WideRows w, int64_t m, int64_t n, bool first, float* sums, Place place) {
    row_tiles(m, kWideX, [&](int64_t from, int64_t rows) {
        float* const to = sums + from * kWideW * 16;
        const auto [x, step, stride] = place(from, rows);
        switch (rows) {
            case 1: return wide_tile<1>(w, x, step, stride, n / 32, first, to);
            case 2: return wide_tile<2>(w, x, step, stride, n / 32, first, to);
            case 3: return wide_tile<3>(w, x, step, stride, n / 32, first, to);
            case 4: return wide_tile<4>(w, x, step, stride, n / 32, first, to);
            case 5: return wide_tile<5>(w, x, step, stride, n / 32, first, to);
            case 6: return wide_tile<6>(w, x, step, stride, n / 32, first, to);
        }
    });
}

// Columns [column, column + columns) of y, at most kWideW.
inline void write_wide(const Gemm& g, int64_t column, int64_t columns, float* sums) {
    for (int64_t i = 0; i < g.m * kWideW; i += 16) {
        __m512 lanes[16];
        for (int j = 0; j < 16; ++j) lanes[j] = _mm512_load_ps(sums + 16 * (i + j));
        _mm512_store_ps(sums + i, sums_of_lanes(lanes));
    }
    const __mmask8 inside = static_cast<__mmask8>((1 << columns) - 1);
    __m256 bias = _mm256_setzero_ps();
    if (g.bias) {
        const __m128i bits = _mm_maskz_loadu_epi16(inside, static_cast<const BF16*>(g.bias) + column);
        bias = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    BF16* to = static_cast<BF16*>(g.y) + column;
    for (int64_t i = 0; i < g.m; ++i, to += g.stride_y) {
        const __m256 y = _mm256_add_ps(_mm256_maskz_loadu_ps(inside, sums + i * kWideW), bias);
        _mm_mask_storeu_epi16(to, inside, reinterpret_cast<__m128i>(_mm256_cvtneps_pbh(y)));
    }
}

// Elements [begin, begin + n) of rows `row(0)`, `row(1)` ... of W, up to a multiple of 32 with zeros where x has them:
// where they are, or in the scratch.
template <class Row>
inline void wide_rows(const Gemm& g, Row row, int64_t begin, int64_t n, const WideScratch& scratch,
                      const uint16_t* (&w)[kWideW]) {
    const int64_t padded = wide_stride(n);
    for (int r = 0; r < kWideW; ++r) {
        uint16_t* const buffer = scratch.row(r);
        if (!g.dense) {
            const int64_t at = row(r) * g.k + begin;
            prefetch(g, at + 2 * kWideAhead);
            w[r] = decode_span(g, at, n, buffer);
            // What stands behind the row meets zeros of x, and must be finite.
            memset(buffer + (w[r] - buffer) + n, 0, sizeof(uint16_t) * static_cast<size_t>(padded - n));
            continue;
        }
        const BF16* const from = static_cast<const BF16*>(g.dense) + row(r) * g.stride_dense + begin;
        w[r] = n == padded ? &from->bits : buffer;
        for (int64_t k = 0; n != padded && k < n; k += 32) {
            _mm512_storeu_si512(buffer + k, load32(from + k, first32(n - k)));
        }
    }
}

// Columns of y, at most kWideW; x is packed.
inline void wide_dot(const Gemm& g, const BF16* x, int64_t column, int64_t columns, const WideScratch& scratch) {
    const int64_t stride = wide_stride(g.k);
    // Of fewer columns than kWideW the last is computed again, and not written.
    const auto row = [&](int r) { return column + lesser(r, columns - 1); };
    bool first = true;
    const uint16_t* w[kWideW];
    for (int64_t begin = 0; begin < g.k; begin += kWideSpan) {
        const int64_t n = lesser(kWideSpan, g.k - begin);
        wide_rows(g, row, begin, n, scratch, w);
        wide_products(w, g.m, wide_stride(n), first, scratch.sums, [&](int64_t from, int64_t rows) {
            return WideX{x + from * stride + begin * rows, 32 * rows, 32};
        });
        first = false;
    }
    const int64_t rank = g.low_rank ? g.low_rank->r : 0;
    for (int64_t begin = 0; begin < rank; begin += kWideSpan) {
        const int64_t n = lesser(kWideSpan, rank - begin);
        for (int r = 0; r < kWideW; ++r) {
            w[r] = scratch.row(r);
            for (int64_t k = 0; k < n; k += 32) {
                _mm512_storeu_si512(scratch.row(r) + k, low_rank_vector(*g.low_rank, row(r), begin + k));
            }
        }
        wide_products(w, g.m, wide_stride(n), first, scratch.sums, [&](int64_t from, int64_t) {
            const BF16* const s = static_cast<const BF16*>(g.low_rank->s);
            return WideX{s + from * g.low_rank->stride_s + begin, 32, g.low_rank->stride_s};
        });
        first = false;
    }
    if (first) memset(scratch.sums, 0, static_cast<size_t>(WideScratch::bytes(g.m) - WideScratch::kRowsBytes));
    write_wide(g, column, columns, scratch.sums);
}

inline bool serves_wide_dots(const Gemm& g) {
    return g.dtype == LORA_OPS_BF16 && !g.dx && !g.transposed && g.m <= most_wide_rows(g);
}

inline GemmPlan plan_wide_dots(const Gemm& g, int) {
    GemmPlan plan = {};
    plan.tasks = ceil_div(g.n, kDotColumns);
    plan.shared_bytes = g.m * wide_stride(g.k) * int64_t{sizeof(BF16)};
    plan.scratch_bytes = WideScratch::bytes(g.m);
    return plan;
}

inline void prepare_wide_dots(const Gemm& g, char* shared) { pack_wide(g, reinterpret_cast<BF16*>(shared)); }

inline void wide_dots_task(const Gemm& g, const GemmPlan&, int64_t task, const char* shared, char* own) {
    const WideScratch scratch(own);
    const int64_t end = lesser((task + 1) * kDotColumns, g.n);
    for (int64_t column = task * kDotColumns; column < end; column += kWideW) {
        wide_dot(g, reinterpret_cast<const BF16*>(shared), column, lesser(kWideW, end - column), scratch);
    }
}

}  // namespace
}  // namespace lora_ops
