// The engine of panels.h for bfloat16: panels of W, decoded or copied, and a micro-kernel of vdpbf16ps.
#pragma once

#include <string.h>

#include "gemm/blocks.h"
#include "gemm/decode_avx512_bf16.h"
#include "gemm/panels.h"

namespace lora_ops {
namespace {

// A panel is [depth / 2, kColumns, 2]: the pairs of terms that vdpbf16ps adds are neighbours.
struct Bf16Engine {
    static constexpr bool kFuses = true;
    static constexpr int kRows = 6, kVectors = 4, kColumns = 16 * kVectors;  // 24 accumulators, 4 + 1 operands
    static constexpr int64_t kDepth = 4096;
    static constexpr int64_t kPanelBytes = kDepth * kColumns * 2;
    static constexpr int64_t kTileBytes = 0;
    static constexpr int64_t kAhead = 256;      // bytes of a row of W: the time that 16 rows of 512 weights take
    static constexpr int64_t kRowsAhead = 16;

    static void panel(const Gemm& g, int64_t column, int64_t begin, int64_t depth, void* panel) {
        if (g.dense) return dense_panel(g, column, begin, depth, static_cast<uint16_t*>(panel));
        if (is_aligned(g) && column + kColumns <= g.columns && depth % 64 == 0) {
            if (g.dx) return aligned_panel_of_columns(g, column, begin, depth, static_cast<uint16_t*>(panel));
            return aligned_panel_of_rows(g, column, begin, depth, static_cast<uint16_t*>(panel));
        }
        if (g.dx) return panel_of_columns(g, column, begin, depth, static_cast<uint16_t*>(panel));
        panel_of_rows(g, column, begin, depth, static_cast<uint16_t*>(panel));
    }

    static void aligned_panel_of_rows(const Gemm& g, int64_t column, int64_t begin, int64_t depth, uint16_t* panel) {
        const int64_t row_bytes = g.k / 2, ahead = kAhead < row_bytes ? kAhead : row_bytes;
        alignas(64) uint16_t buffer[16][64];
        float scales[16][kDepth / 64];
        const Interleaved32 order;
        for (int vector = 0; vector < kVectors; ++vector) {
            const int64_t first = (column + 16 * vector) * g.k + begin;
            for (int i = 0; i < 16; ++i) scales_of_64(g.w, first + i * g.k, depth / 64, scales[i]);
            for (int64_t k = 0; k < depth; k += 64) {
                const uint8_t* packed = g.w.packed + (first + k) / 2;
                const uint8_t* soon = packed + ahead;
                if (begin + k + 2 * ahead >= g.k) soon += 15 * row_bytes;  // of the next 16 rows
                for (int i = 0; i < 16; ++i) {
                    if (k % 128 == 0) _mm_prefetch(reinterpret_cast<const char*>(soon + i * row_bytes), _MM_HINT_T0);
                    const __m512i table = bf16_table(scales[i][k / 64]);
                    _mm512_store_si512(buffer[i], order.decode(table, packed + i * row_bytes));
                    _mm512_store_si512(buffer[i] + 32, order.decode(table, packed + i * row_bytes + 16));
                }
                for (int half = 0; half < 2; ++half) {
                    __m512i r[16];
                    for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(buffer[i] + 32 * half);
                    transpose16(r);
                    uint16_t* to = panel + (k + 32 * half) * kColumns + 32 * vector;
                    for (int i = 0; i < 16; ++i) _mm512_store_si512(to + Interleaved32::pair(i) * 2 * kColumns, r[i]);
                }
            }
        }
    }

    static void aligned_panel_of_columns(const Gemm& g, int64_t column, int64_t begin, int64_t depth,
                                         uint16_t* panel) {
        const Interleaved32 order;
        BlockWalk block(g.w, begin * g.k + column, g.k);
        for (int64_t i = 0; i < depth; i += 2) {
            __m512i row[2][2];
            for (int j = 0; j < 2; ++j) {
                const uint8_t* packed = g.w.packed + ((begin + i + j) * g.k + column) / 2;
                _mm_prefetch(reinterpret_cast<const char*>(packed + kRowsAhead * (g.k / 2)), _MM_HINT_T0);
                const __m512i table = bf16_table(nf4_absmax(g.w, block.next()));
                row[j][0] = order.decode(table, packed);
                row[j][1] = order.decode(table, packed + 16);
            }
            // Lane by lane, and back in order: elements 0-15 are the even quadwords.
            const __m512i low = _mm512_set_epi16(59, 27, 58, 26, 57, 25, 56, 24, 51, 19, 50, 18, 49, 17, 48, 16,  //
                                                 43, 11, 42, 10, 41, 9, 40, 8, 35, 3, 34, 2, 33, 1, 32, 0);
            const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(4));
            for (int half = 0; half < 2; ++half) {
                uint16_t* const to = panel + i * kColumns + 64 * half;
                _mm512_store_si512(to, _mm512_permutex2var_epi16(row[0][half], low, row[1][half]));
                _mm512_store_si512(to + 32, _mm512_permutex2var_epi16(row[0][half], high, row[1][half]));
            }
        }
    }

    // Two rows of 32 -> 32 pairs.
    static void interleave(__m512i a, __m512i b, uint16_t* out) {
        const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,  //
                                             39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        _mm512_store_si512(out, _mm512_permutex2var_epi16(a, low, b));
        _mm512_store_si512(out + 32, _mm512_permutex2var_epi16(a, high, b));
    }

    static void dense_panel(const Gemm& g, int64_t column, int64_t begin, int64_t depth, uint16_t* panel) {
        const BF16* const w = static_cast<const BF16*>(g.dense);
        const int64_t columns = lesser(kColumns, g.columns - column), stride = g.stride_dense;
        if (g.columns_are_rows()) return copy_rows(w + column * stride + begin, stride, columns, depth, panel);
        copy_columns(w + begin * stride + column, stride, columns, depth, panel);
    }

    static void low_rank_panel(const Gemm& g, int64_t column, void* panel) {
        const int64_t columns = lesser(kColumns, g.columns - column), rank = g.low_rank->r;
        uint16_t* const to = static_cast<uint16_t*>(panel);
        with_dtype(g.low_rank->factor_dtype, [&](auto type) {
            const auto* const factor = static_cast<const decltype(type)*>(g.low_rank->factor);
            if (g.dx) return copy_columns(factor + column, g.k, columns, rank, to);
            copy_rows(factor + column * rank, rank, columns, rank, to);
        });
    }

    // A panel whose columns are the first `columns` rows of w [columns, depth], rounded to bfloat16.
    template <class T>
    static void copy_rows(const T* w, int64_t stride, int64_t columns, int64_t depth, uint16_t* panel) {
        for (int vector = 0; vector < kVectors; ++vector) {
            const int64_t first = 16 * vector;
            for (int64_t k = 0; k < depth; k += 32) {
                const __mmask32 inside = first32(depth - k);
                __m512i r[16];
                for (int i = 0; i < 16; ++i) {
                    const T* const from = w + (first + i) * stride + k;
                    _mm_prefetch(reinterpret_cast<const char*>(from) + kAhead, _MM_HINT_T0);
                    r[i] = first + i < columns ? load32(from, inside) : _mm512_setzero_si512();
                }
                transpose16(r);
                uint16_t* const to = panel + k * kColumns + 32 * vector;
                for (int i = 0; i < 16 && k + 2 * i < depth; ++i) _mm512_store_si512(to + i * 2 * kColumns, r[i]);
            }
        }
    }

    // A panel whose columns are those of w [depth, columns].
    template <class T>
    static void copy_columns(const T* w, int64_t stride, int64_t columns, int64_t depth, uint16_t* panel) {
        for (int64_t i = 0; i < depth; i += 2) {
            for (int j = 0; j < kColumns; j += 32) {
                const __mmask32 inside = first32(columns - j);
                const T* const from = w + i * stride + j;
                _mm_prefetch(reinterpret_cast<const char*>(from + kRowsAhead * stride), _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(from + (kRowsAhead + 1) * stride), _MM_HINT_T0);
                const __m512i next = i + 1 < depth ? load32(from + stride, inside) : _mm512_setzero_si512();
                interleave(load32(from, inside), next, panel + i * kColumns + 2 * j);
            }
        }
    }

    // y: a column of the output is a row of W. Rows are decoded to L1, 16 at a time, and transposed by pairs.
    static void panel_of_rows(const Gemm& g, int64_t column, int64_t begin, int64_t depth, uint16_t* panel) {
        constexpr int64_t kSpan = 256, kRoom = kSpan + 64;
        alignas(64) uint16_t rows[16 * kRoom] = {};
        for (int vector = 0; vector < kVectors; ++vector) {
            for (int64_t k = 0; k < depth; k += kSpan) {
                const int64_t n = lesser(kSpan, depth - k);
                // What comes next: this row's next span but one, or the start of the rows after these 16.
                const int64_t ahead = begin + k + 2 * kSpan < g.k ? 2 * kSpan : 16 * g.k - begin - k;
                const uint16_t* row[16];
                for (int i = 0; i < 16; ++i) {
                    const int64_t at = column + 16 * vector + i;
                    row[i] = rows + i * kRoom;
                    if (at < g.n) {
                        const int64_t first = at * g.k + begin + k;
                        prefetch(g, first + ahead);
                        prefetch(g, first + ahead + 128);
                        row[i] = decode_span(g, first, n, rows + i * kRoom);
                    } else {
                        memset(rows + i * kRoom, 0, sizeof(uint16_t) * kRoom);
                    }
                }
                transpose_span(row, n, panel + k * kColumns + 32 * vector);
            }
        }
    }

    static void transpose_span(const uint16_t* const rows[16], int64_t n, uint16_t* to) {
        for (int64_t pair = 0; 2 * pair < n; pair += 16) {
            __m512i r[16];
            for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i] + 2 * pair);
            transpose16(r);
            if (2 * pair + 32 <= n) {
                for (int i = 0; i < 16; ++i) _mm512_store_si512(to + (pair + i) * 2 * kColumns, r[i]);
                continue;
            }
            for (int i = 0; 2 * (pair + i) < n; ++i) {
                // Of an odd depth's last pair the upper half is none of the sum's.
                if (2 * (pair + i) + 1 == n) r[i] = _mm512_and_si512(r[i], _mm512_set1_epi32(0xffff));
                _mm512_store_si512(to + (pair + i) * 2 * kColumns, r[i]);
            }
        }
    }

    // dX: a column of the output is a column of W. Two rows of W make a pair of terms.
    static void panel_of_columns(const Gemm& g, int64_t column, int64_t begin, int64_t depth, uint16_t* panel) {
        alignas(64) uint16_t rows[2][kColumns + 64] = {};
        const int64_t n = lesser(kColumns, g.k - column);
        for (int64_t i = 0; i < depth; i += 2) {
            const uint16_t* row[2];
            for (int j = 0; j < 2; ++j) {
                row[j] = rows[j];
                if (i + j < depth) {
                    const int64_t first = (begin + i + j) * g.k + column;
                    prefetch(g, first + kRowsAhead * g.k);
                    prefetch(g, first + kRowsAhead * g.k + n - 1);
                    row[j] = decode_span(g, first, n, rows[j]);
                } else {
                    memset(rows[j], 0, sizeof rows[j]);
                }
            }
            for (int j = 0; j < kColumns; j += 32) {
                interleave(_mm512_loadu_si512(row[0] + j), _mm512_loadu_si512(row[1] + j),
                           panel + i * kColumns + 2 * j);
            }
        }
    }

    // sum += x [rows, depth] times a panel.
    template <int rows>
    static __attribute__((always_inline)) void add_products(__m512 (&sum)[rows][kVectors], const BF16* x,
                                                            int64_t stride, int64_t depth, const void* packed) {
        const uint16_t* const panel = static_cast<const uint16_t*>(packed);
        const auto step = [&](int64_t pair, const auto& x_pair) {
            __m512bh w[kVectors];
            for (int j = 0; j < kVectors; ++j) {
                w[j] = as_bf16(_mm512_load_si512(panel + (pair * kVectors + j) * 32));
            }
            for (int i = 0; i < rows; ++i) {
                const __m512bh x_i = as_bf16(_mm512_set1_epi32(x_pair(i)));
                for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], x_i, w[j]);
            }
        };
        for (int64_t pair = 0; pair < depth / 2; ++pair) {
            step(pair, [&](int i) {
                int bits;
                memcpy(&bits, x + i * stride + 2 * pair, sizeof bits);
                return bits;
            });
        }
        if (depth % 2) step(depth / 2, [&](int i) { return int{x[i * stride + depth - 1].bits}; });
    }

    // With a mask apart from the other sums, which wait in the L1 cache.
    template <int rows>
    static __attribute__((always_inline)) void add_low_rank(__m512 (&sum)[rows][kVectors], const Tile<BF16>& t) {
        if (!t.mask) return add_products(sum, t.s, t.stride_s, t.r, t.factor);
        alignas(64) float base[rows][kColumns];
        for (int i = 0; i < rows; ++i) {
            for (int j = 0; j < kVectors; ++j) {
                _mm512_store_ps(base[i] + 16 * j, sum[i][j]);
                sum[i][j] = _mm512_setzero_ps();
            }
        }
        add_products(sum, t.s, t.stride_s, t.r, t.factor);
        for (int i = 0; i < rows; ++i) {
            uint16_t kept[kVectors];
            memcpy(kept, t.mask + i * t.stride_mask, sizeof kept);
            for (int j = 0; j < kVectors; ++j) {
                const __m512 from = _mm512_load_ps(base[i] + 16 * j);
                sum[i][j] = _mm512_mask_add_ps(from, kept[j], from, sum[i][j]);
            }
        }
    }

    template <int rows>
    static void tile(const Tile<BF16>& t, void*) {
        __m512 sum[rows][kVectors];
        for (int i = 0; i < rows; ++i) {
            for (int j = 0; j < kVectors; ++j) {
                sum[i][j] = t.first ? _mm512_setzero_ps() : _mm512_loadu_ps(t.sums + i * kColumns + 16 * j);
            }
        }
        add_products(sum, t.x, t.stride_x, t.depth, t.panel);
        if (t.last && t.r) add_low_rank(sum, t);

        if (!t.last) {
            for (int i = 0; i < rows; ++i) {
                for (int j = 0; j < kVectors; ++j) _mm512_storeu_ps(t.sums + i * kColumns + 16 * j, sum[i][j]);
            }
            return;
        }
        for (int j = 0; j < kVectors && 16 * j < t.columns; ++j) {
            const __mmask16 mask = first16(t.columns - 16 * j);
            __m512 bias = _mm512_setzero_ps();
            if (t.bias) {
                const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, t.bias + 16 * j));
                bias = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
            }
            for (int i = 0; i < rows; ++i) {
                const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_add_ps(sum[i][j], bias));
                _mm256_mask_storeu_epi16(t.y + i * t.stride_y + 16 * j, mask, reinterpret_cast<__m256i>(rounded));
            }
        }
    }
};

inline bool serves_panels(const Gemm& g) { return g.dtype == LORA_OPS_BF16; }

inline void panels_task(const Gemm& g, const GemmPlan& plan, int64_t task, const char*, char* scratch) {
    panel_task<Bf16Engine, BF16>(g, plan, task, scratch);
}

}  // namespace
}  // namespace lora_ops
