// The engine of panels.h for bfloat16 with BFMMLA, which adds to a 2 x 2 block of sums the products of 2 x 4 and 4 x 2: 16
// multiply-adds, where fp32 has 4 an instruction. It rounds sums to odd and takes subnormal numbers for zeros.
#pragma once

#include <string.h>

#include "gemm/panels.h"
#include "isa/neon.h"
#include "nf4/neon.h"

namespace lora_ops {
namespace {

// A panel is [kParts, depth / 4, kWidth, 4], a tile of x [depth / 4, rows, 4]: depth is padded with zeros to a multiple of
// 4, rows to one of 2.
struct NeonBf16Engine {
    static constexpr int kRows = 8, kWidth = 8, kColumns = 64, kParts = kColumns / kWidth;  // 16 blocks, 4 + 4 operands
    static constexpr bool kFuses = false;
    static constexpr int64_t kDepth = 1024;
    static constexpr int64_t kPanelBytes = kDepth * kColumns * 2;
    static constexpr int64_t kTileBytes = kRows * kDepth * 2;

    static int64_t padded(int64_t depth) { return ceil_div(depth, 4) * 4; }

    static void panel(const Gemm& g, int64_t column, int64_t begin, int64_t depth, void* panel) {
        uint16_t* const to = static_cast<uint16_t*>(panel);
        if (g.columns_are_rows()) {
            for (int64_t j = 0; j < kColumns; ++j) {
                panel_column(g, column + j, begin, depth, to + j / kWidth * padded(depth) * kWidth + j % kWidth * 4);
            }
        } else {
            for (int64_t i = 0; i < depth; i += 4) panel_rows(g, column, begin + i, depth - i, to + i * kWidth, depth);
        }
    }

    // Elements [column, column + n) of a row of W, in out or where they stand; out has room for n + 62.
    static const BF16* row_of(const Gemm& g, int64_t row, int64_t column, int64_t n, BF16* out) {
        if (g.dense) return static_cast<const BF16*>(g.dense) + row * g.stride_dense + column;
        const int64_t begin = row * g.k + column, first = begin / 32 * 32;
        const int64_t last = lesser(ceil_div(begin + n, 32) * 32, g.n * g.k);
        nf4_dequantize<NeonNF4>(g.w, first / g.w.block_size, first, last, out);
        return out + (begin - first);
    }

    // A column that lies along a row of W.
    static void panel_column(const Gemm& g, int64_t column, int64_t begin, int64_t depth, uint16_t* to) {
        constexpr int64_t kSpan = 256;
        BF16 decoded[kSpan + 62];
        for (int64_t k = 0; k < depth; k += kSpan) {
            const int64_t n = lesser(kSpan, depth - k);
            const BF16* const from = column < g.columns ? row_of(g, column, begin + k, n, decoded) : nullptr;
            for (int64_t i = 0; i < n; i += 4) {
                uint16_t four[4] = {};
                if (from && i + 4 <= n) memcpy(four, from + i, sizeof four);
                if (from && i + 4 > n) memcpy(four, from + i, sizeof *four * static_cast<size_t>(n - i));
                memcpy(to + (k + i) * kWidth, four, sizeof four);
            }
        }
    }

    // 4 terms of every column, of which `left` are there, from as many rows of W.
    static void panel_rows(const Gemm& g, int64_t column, int64_t row, int64_t left, uint16_t* to, int64_t depth) {
        BF16 rows[4][kColumns + 62];
        uint16_t padded_rows[4][kColumns] = {};
        const int64_t n = lesser(kColumns, g.columns - column);
        for (int64_t i = 0; i < lesser(4, left); ++i) {
            memcpy(padded_rows[i], row_of(g, row + i, column, n, rows[i]), sizeof(BF16) * static_cast<size_t>(n));
        }
        for (int part = 0; part < kParts; ++part) {
            uint16x8x4_t four;
            for (int i = 0; i < 4; ++i) four.val[i] = vld1q_u16(padded_rows[i] + part * kWidth);
            vst4q_u16(to + part * padded(depth) * kWidth, four);
        }
    }

    static void pack_pair(const BF16* a, const BF16* b, int64_t depth, int64_t step, uint16_t* to) {
        const auto put = [&](int64_t k, const BF16* x, const BF16* y, bool both) {
            const uint64x2_t first = vreinterpretq_u64_u16(vld1q_u16(words_of(x)));
            const uint64x2_t second = vreinterpretq_u64_u16(vld1q_u16(words_of(y)));
            vst1q_u16(to + k / 4 * step, vreinterpretq_u16_u64(vzip1q_u64(first, second)));
            if (both) vst1q_u16(to + (k / 4 + 1) * step, vreinterpretq_u16_u64(vzip2q_u64(first, second)));
        };
        int64_t k = 0;
        for (; k + 8 <= depth; k += 8) put(k, a + k, b + k, true);
        if (k == depth) return;
        BF16 last[2][8] = {};
        memcpy(last[0], a + k, sizeof *a * static_cast<size_t>(depth - k));
        memcpy(last[1], b + k, sizeof *b * static_cast<size_t>(depth - k));
        put(k, last[0], last[1], depth - k > 4);
    }

    template <int rows>
    static void tile(const Tile<BF16>& t, void* scratch) {
        constexpr int kPairs = (rows + 1) / 2;
        uint16_t* const x = static_cast<uint16_t*>(scratch);
        for (int i = 0; i < kPairs; ++i) {
            const BF16* const a = t.x + 2 * i * t.stride_x;
            pack_pair(a, 2 * i + 1 < rows ? a + t.stride_x : a, t.depth, 8 * kPairs, x + 8 * i);
        }
        for (int part = 0; part < kParts && part * kWidth < t.columns; ++part) part_of_tile<rows>(t, x, part * kWidth);
    }

    template <int rows>
    static void part_of_tile(const Tile<BF16>& t, const uint16_t* x, int64_t column) {
        constexpr int kPairs = (rows + 1) / 2;
        const uint16_t* w = static_cast<const uint16_t*>(t.panel) + column * padded(t.depth);
        float32x4_t sum[kPairs][4];
        for (auto& row : sum) {
            for (float32x4_t& s : row) s = vdupq_n_f32(0);
        }
        for (int64_t k = 0; k < t.depth; k += 4, x += 8 * kPairs, w += 4 * kWidth) {
            bfloat16x8_t right[4];
            for (int j = 0; j < 4; ++j) right[j] = vreinterpretq_bf16_u16(vld1q_u16(w + 8 * j));
            for (int i = 0; i < kPairs; ++i) {
                const bfloat16x8_t left = vreinterpretq_bf16_u16(vld1q_u16(x + 8 * i));
                for (int j = 0; j < 4; ++j) sum[i][j] = vbfmmlaq_f32(sum[i][j], left, right[j]);
            }
        }
        for (int i = 0; i < rows; ++i) {
            for (int half = 0; half < 2; ++half) {
                const float64x2_t a = vreinterpretq_f64_f32(sum[i / 2][2 * half]);
                const float64x2_t b = vreinterpretq_f64_f32(sum[i / 2][2 * half + 1]);
                const float64x2_t four = i % 2 ? vzip2q_f64(a, b) : vzip1q_f64(a, b);
                finish4(t, i, column + 4 * half, vreinterpretq_f32_f64(four));
            }
        }
    }

    static void finish4(const Tile<BF16>& t, int row, int64_t column, float32x4_t sum) {
        float* const sums = t.sums + row * kColumns + column;
        if (!t.first) sum = vaddq_f32(sum, vld1q_f32(sums));
        if (!t.last) return vst1q_f32(sums, sum);
        BF16* const y = t.y + row * t.stride_y + column;
        if (column + 4 <= t.columns) return store4(y, t.bias ? vaddq_f32(sum, load4(t.bias + column)) : sum);
        float each[4];
        vst1q_f32(each, sum);
        for (int64_t j = 0; column + j < t.columns; ++j) {
            y[j] = round_to<BF16>(each[j] + (t.bias ? to_float(t.bias[column + j]) : 0.0f));
        }
    }
};

constexpr GemmRoute neon_bf16_panels() {
    return {[](const Gemm& g) { return g.dtype == LORA_OPS_BF16; }, panel_plan<NeonBf16Engine>, nullptr,
            [](const Gemm& g, const GemmPlan& plan, int64_t task, const char*, char* scratch) {
                panel_task<NeonBf16Engine, BF16>(g, plan, task, scratch);
            }};
}

}  // namespace
}  // namespace lora_ops
