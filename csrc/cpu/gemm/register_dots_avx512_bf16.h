// y for few rows of x: products along K, with 16 sums of each that meet at the end. W is never transposed.
#pragma once

#include <new>

#include "gemm/blocks.h"
#include "gemm/decode_avx512_bf16.h"
#include "gemm/dot_sums_avx512_bf16.h"

namespace lora_ops {
namespace {

// Two to four rows of W are decoded in registers and multiplied at once with up to eight rows of x, along K.
//
// A group of 64 weights is decoded while the group before it is multiplied, across the ends of rows. In order, its
// loads, its table and its permutes are a chain of 25 cycles that the scheduler does not see early enough: with 8 rows
// of x and 2 of W a group takes 42 cycles then and 37 so, where the products need 32 and the tables 5 (Zen 4). Decoding
// must also keep off the two pipes that multiply: see Interleaved64.
//
// More than four rows of x go by parts of K, so that x comes from the L1 cache: L2 is too slow for it beside W, with 40
// cycles a group. After each part the 16 sums of a product become one. To store them all took 35 cycles.
//
// What limits a few rows is how many lines of W, and of its scales, are on their way from memory. Rows of W that are
// worked on together are therefore far apart, each the head of a stream of its own for the hardware's prefetcher, with
// a fetch ahead of it that reaches over the end of a row. Two Zen 4 cores, 4096 x 4096, dense weights used in between,
// ms for 1, 8, 16 and 32 rows: 0.28, 0.77, 1.47, 2.77; without fetching scales 0.28, 0.80, 1.60, 2.95.
constexpr int kMostDotRows = 48;           // more are faster in panels
constexpr int kDotTile = 8;                // rows of x at once: 16 sums, two decoded groups of two rows of W
constexpr int64_t kDotDepth = 1024;        // terms of a pass: x takes half of the L1 cache, scales of a row a line
constexpr int64_t kMostUnblocked = 4;      // rows of x that L2 feeds fast enough: a pass takes all of K
constexpr int64_t kDotAhead = 4096;        // bytes between a fetch and its use

// What a pass over x works on: rows column + i + r * apart of W, i < count, and the terms of their sums whose part of x
// stays in the L1 cache.
struct DotPass {
    int64_t column, apart, count;
    int64_t begin, groups;  // terms [begin, begin + 64 groups)
    const float* scales;    // of the groups of row column + i at scales + i * scales_row
    int64_t scales_row;
    const uint8_t* after;  // where the pass after this one begins in W
    const float* scales_after;
    bool first, last;
    uint16_t* tables;  // [count, groups, rows, 16], and one group more
};

// Tables are made on the pipes that multiply: the first of several tiles of x keeps them for the others.
enum class Tables { kMade, kKept, kRead };

// Rows first + i of y, i < m, with K and the block size multiples of 64; x as pack_dots has it, from its row `first` and
// term `begin` on. Between passes the sums [count, 16] wait in memory.
template <int m, int rows, Tables kTables>
void dot_pass(const Gemm& g, const DotPass& p, const BF16* x, int64_t first, float* sums) {
    const Interleaved64 order;
    constexpr bool kBlocked = m > kMostUnblocked;
    const int64_t row_bytes = g.k / 2, scales_apart = p.apart * p.scales_row;
    // Rows between a fetch and its use. Parts of rows are fetched to L2 first: they share too few sets of the L1 cache.
    const int64_t near = lesser(kBlocked ? 1 : ceil_div(kDotAhead, row_bytes), p.count), far = lesser(8, p.count);
    const uint8_t* packed = g.w.packed + (p.column * g.k + p.begin) / 2;
    const float* scales = p.scales;
    uint16_t* tables = p.tables;
    __m512 sum[m][rows];
    __m512i w[2][rows], next[2][rows];
    const auto decode = [&](const uint8_t* from, const float* scale, __m512i(&to)[2][rows])
                            __attribute__((always_inline)) {
        for (int r = 0; r < rows; ++r) {
            __m512i table;
            if constexpr (kTables == Tables::kRead) {
                table = Interleaved64::load(reinterpret_cast<const uint8_t*>(tables));
            } else {
                table = bf16_table(scale[r * scales_apart]);
            }
            if constexpr (kTables == Tables::kKept) {
                _mm256_store_si256(reinterpret_cast<__m256i*>(tables), _mm512_castsi512_si256(table));
            }
            tables += 16;
            const __m512i words = Interleaved64::load(from + r * p.apart * row_bytes);
            for (int half = 0; half < 2; ++half) to[half][r] = order.decode(table, words, half);
        }
    };
    decode(packed, scales, w);
    for (int64_t i = 0; i < p.count; ++i, packed += row_bytes, scales += p.scales_row, sums += 16) {
        const auto row_ahead = [&](int64_t n) {
            return i + n < p.count ? packed + n * row_bytes : p.after + (i + n - p.count) * row_bytes;
        };
        const uint8_t *const to_l1 = row_ahead(near), *const to_l2 = row_ahead(far);
        const float* const far_scales = i + far < p.count ? scales + far * p.scales_row
                                                          : p.scales_after + (i + far - p.count) * p.scales_row;
        for (int r = 0; kBlocked && r < rows; ++r) {
            const float* const from = far_scales + r * scales_apart;
            _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(from + p.groups - 1), _MM_HINT_T0);
        }
        for (int j = 0; j < m * rows; ++j) sum[j / rows][j % rows] = _mm512_setzero_ps();
        const BF16* from = x;
        // Multiplies the group that is decoded, and decodes the next.
        const auto step = [&](int64_t group, const uint8_t* next_packed, const float* next_scales)
                              __attribute__((always_inline)) {
            for (int r = 0; r < rows; ++r) {
                const int64_t at = r * p.apart * row_bytes + 32 * group;
                _mm_prefetch(reinterpret_cast<const char*>(to_l1 + at), _MM_HINT_T0);
                if (kBlocked) _mm_prefetch(reinterpret_cast<const char*>(to_l2 + at), _MM_HINT_T1);
            }
            decode(next_packed, next_scales, next);
            for (int half = 0; half < 2; ++half) {
                for (int j = 0; j < m; ++j, from += 32) {
                    const __m512bh x_j = as_bf16(_mm512_load_si512(from));
                    for (int r = 0; r < rows; ++r) sum[j][r] = _mm512_dpbf16_ps(sum[j][r], x_j, as_bf16(w[half][r]));
                }
            }
            for (int v = 0; v < 2 * rows; ++v) w[v / rows][v % rows] = next[v / rows][v % rows];
        };
        for (int64_t group = 0; group + 1 < p.groups; ++group) {
            step(group, packed + 32 * (group + 1), scales + group + 1);
        }
        const bool more = i + 1 < p.count;
        step(p.groups - 1, packed + (more ? row_bytes : 0), scales + (more ? p.scales_row : 0));
        if (p.last && g.low_rank) add_low_rank_dots(*g.low_rank, first, p.column + i, p.apart, sum);
        __m512 total = dots(sum);
        if (!p.first) total = _mm512_add_ps(total, _mm512_load_ps(sums));
        if (p.last) {
            write_dots<m, rows>(g, first, p.column + i, p.apart, total);
        } else {
            _mm512_store_ps(sums, total);
        }
    }
}

// x for dot_pass: of each tile [K / 64, 2, rows, 32], interleaved.
inline void pack_dots(const Gemm& g, BF16* to) {
    row_tiles(g.m, kDotTile, [&](int64_t first, int64_t rows) {
        for (int64_t k = 0; k < g.k; k += 64, to += 64 * rows) {
            for (int64_t i = 0; i < rows; ++i) {
                const BF16* const from = static_cast<const BF16*>(g.x) + (first + i) * g.stride_x + k;
                const __m512i low = _mm512_loadu_si512(from), high = _mm512_loadu_si512(from + 32);
                for (int half = 0; half < 2; ++half) {
                    _mm512_store_si512(to + 32 * (half * rows + i), Interleaved64::interleave(low, high, half));
                }
            }
        }
    });
}

template <int rows, Tables kTables>
void dot_tile(const Gemm& g, const DotPass& p, const BF16* x, int64_t first, int64_t m, float* sums) {
    if constexpr (kTables == Tables::kMade) {
        switch (m) {
            case 1: return dot_pass<1, rows, kTables>(g, p, x, first, sums);
            case 2: return dot_pass<2, rows, kTables>(g, p, x, first, sums);
            case 3:
                if constexpr (rows <= 3) return dot_pass<3, rows, kTables>(g, p, x, first, sums);
        }
    }
    if constexpr (rows <= 3) {
        if (m == 4) return dot_pass<4, rows, kTables>(g, p, x, first, sums);
    }
    if constexpr (rows <= 2) {
        switch (m) {
            case 5: return dot_pass<5, rows, kTables>(g, p, x, first, sums);
            case 6: return dot_pass<6, rows, kTables>(g, p, x, first, sums);
            case 7: return dot_pass<7, rows, kTables>(g, p, x, first, sums);
            case 8: return dot_pass<8, rows, kTables>(g, p, x, first, sums);
        }
    }
}

// Terms of a pass: all of K for few rows of x, else as many as leave a tile of x in the L1 cache.
inline int64_t dot_depth(const Gemm& g) { return g.m <= kMostUnblocked ? g.k : lesser(g.k, kDotDepth); }

// Whether the scales of groups of 64 are W's as they stand.
inline bool scales_serve(const Gemm& g) { return g.w.absmax && g.w.block_size == 64; }

// What a thread has to itself.
struct DotScratch {
    float* scales;     // [kDotColumns, K / 64], where W's do not serve as they are, and 64 more
    float* sums;       // [tiles of x, kDotColumns, 16]
    uint16_t* tables;  // [kDotColumns, depth / 64, 16], and one group more
    int64_t bytes = 0;
    DotScratch(const Gemm& g, char* memory) {
        const int64_t tiles = ceil_div(g.m, kDotTile);
        const auto take = [&](int64_t n) {
            bytes += n;
            return memory + bytes - n;
        };
        scales = reinterpret_cast<float*>(take(scales_serve(g) ? 0 : (g.k + 64) * int64_t{sizeof(float)}));
        sums = reinterpret_cast<float*>(take(tiles * kDotColumns * 16 * int64_t{sizeof(float)}));
        tables = reinterpret_cast<uint16_t*>(take(tiles > 1 ? (dot_depth(g) + 2) * 16 * int64_t{sizeof(uint16_t)} : 0));
    }
};
static_assert(kDotColumns == 64, "so K of a row are as many groups of 64 as K / 64 of 64 rows");

// Of n groups of 64 elements from element `first` on, a multiple of 64 groups, in room for 64 more.
inline void dot_scales(const Gemm& g, const ScaleBytes* map, int64_t first, int64_t n, float* to) {
    const int64_t groups = g.w.block_size / 64;  // of a block
    int64_t block = first / g.w.block_size;
    if (groups == 1) return map->scales(g.w, block, n, to);
    int64_t left = groups - first % g.w.block_size / 64;
    for (int64_t i = 0; i < n; i += left, left = groups, ++block) {
        const __m512 scale = _mm512_set1_ps(nf4_absmax(g.w, block));
        for (int64_t j = 0; j < lesser(left, n - i); j += 16) _mm512_storeu_ps(to + i + j, scale);
    }
}

// What all threads read.
struct DotShared {
    BF16* x;
    ScaleBytes* map;
    static int64_t bytes(const Gemm& g) {
        return g.m * g.k * int64_t{sizeof(BF16)} + (g.w.absmax ? 0 : int64_t{sizeof(ScaleBytes)});
    }
    DotShared(const Gemm& g, char* memory)
        : x(reinterpret_cast<BF16*>(memory)), map(reinterpret_cast<ScaleBytes*>(x + g.m * g.k)) {}
};

// All of x with the rows of W and the terms of a pass.
template <int rows>
void dot_tiles(const Gemm& g, const DotPass& p, const BF16* x, float* sums) {
    if (p.count == 0) return;
    row_tiles(g.m, kDotTile, [&](int64_t first, int64_t m) {
        const BF16* const from = x + first * g.k + p.begin * m;
        if (g.m <= kDotTile) {
            dot_tile<rows, Tables::kMade>(g, p, from, first, m, sums);
        } else if (first == 0) {
            dot_tile<rows, Tables::kKept>(g, p, from, first, m, sums);
        } else {
            dot_tile<rows, Tables::kRead>(g, p, from, first, m, sums);
        }
        sums += kDotColumns * 16;
    });
}

inline bool serves_register_dots(const Gemm& g) {
    return g.dtype == LORA_OPS_BF16 && !g.dx && !g.dense && g.m <= kMostDotRows && g.k > 0 && is_aligned(g);
}

inline GemmPlan plan_register_dots(const Gemm& g, int) {
    GemmPlan plan = {};
    plan.tasks = ceil_div(g.n, kDotColumns);
    plan.shared_bytes = DotShared::bytes(g);
    plan.scratch_bytes = DotScratch(g, nullptr).bytes;
    return plan;
}

inline void prepare_register_dots(const Gemm& g, char* shared) {
    const DotShared dots(g, shared);
    if (!g.w.absmax) new (dots.map) ScaleBytes(g.w.absmax_map);
    pack_dots(g, dots.x);
}

inline void register_dots_task(const Gemm& g, const GemmPlan&, int64_t task, const char* memory, char* own) {
    const DotShared shared(g, const_cast<char*>(memory));
    const DotScratch scratch(g, own);
    const BF16* const x = shared.x;
    const int64_t column = task * kDotColumns, columns = lesser(kDotColumns, g.n - column);
    const int together = g.m <= 2 ? 4 : g.m <= 4 ? 3 : 2;  // as many rows of W as the registers hold
    const int64_t apart = columns / together, depth = dot_depth(g);
    const bool serve = scales_serve(g);
    const float* const scales = serve ? g.w.absmax + column * g.k / 64 : scratch.scales;
    if (!serve) dot_scales(g, shared.map, column * g.k, columns * g.k / 64, scratch.scales);
    for (int64_t begin = 0; begin < g.k; begin += depth) {
        const int64_t end = lesser(begin + depth, g.k), at = column * g.k + begin;
        DotPass p = {};
        p.column = column;
        p.apart = p.count = apart;
        p.begin = begin;
        p.groups = (end - begin) / 64;
        p.scales = scales + begin / 64;
        p.scales_row = g.k / 64;
        p.first = begin == 0;
        p.last = end == g.k;
        p.scales_after = p.last ? scales + columns * p.scales_row : p.scales + p.groups;
        p.after = g.w.packed + (p.last ? (column + columns) * g.k : at + depth) / 2;
        p.tables = scratch.tables;
        switch (together) {
            case 2: dot_tiles<2>(g, p, x, scratch.sums); break;
            case 3: dot_tiles<3>(g, p, x, scratch.sums); break;
            case 4: dot_tiles<4>(g, p, x, scratch.sums); break;
        }
        p.column += together * apart;
        p.count = columns - together * apart;
        p.scales += together * apart * p.scales_row;
        dot_tiles<1>(g, p, x, scratch.sums + apart * 16);
    }
}

}  // namespace
}  // namespace lora_ops
