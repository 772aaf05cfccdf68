// y for few rows of x: products along K, with 16 sums of each that meet at the end. W is never transposed.
#pragma once

namespace lora_ops {
namespace {

// Two to four rows of W are decoded in registers and multiplied at once with up to eight rows of x, along K.
//
// A group of 64 weights is decoded while the group before it is multiplied. In order, its loads, its table and its
// permutes are a chain of 25 cycles that the scheduler does not see early enough: with 8 rows of x and 2 of W a group
// takes 42 cycles then and 36 so, where the products need 32 (Zen 4). Decoding must also keep off the two pipes that
// multiply: see Folded.
//
// What limits one row is how many lines of W are on their way from memory. Rows of W that are worked on together are
// therefore far apart, each the head of a stream of its own for the hardware's prefetcher, with a fetch ahead of it
// that reaches over the end of a row. 4096 x 4096 from memory on two Zen 5 cores: 0.20 ms with neighbouring rows, 0.14
// with streams, as from the cache; reading alone takes 0.08.
constexpr int kMostDotRows = 24;           // more are faster in panels
constexpr int64_t kMostDotX = 768 << 10;   // bytes of x, which every pair of rows of W reads again from L2
constexpr int kDotTile = 8;                // rows of x at once: 16 sums, two decoded groups of two rows of W
constexpr int64_t kDotColumns = 64;        // rows of W in a task
constexpr int64_t kDotSpan = 4096;         // elements of a row whose scales are fetched at once
constexpr int64_t kDotAhead = 4096;        // bytes between a fetch and its use

// Elements [k, k + 32) of a row of B as bfloat16, zeros beyond its end.
inline __m512i low_rank_vector(const LowRank& low, int64_t row, int64_t k) {
    const int64_t at = row * low.rank + k;
    const __mmask32 inside = first32(low.rank - k);
    if (low.right_dtype == LORA_OPS_F32) return load32(static_cast<const float*>(low.right) + at, inside);
    if (low.right_dtype == LORA_OPS_F16) return load32(static_cast<const F16*>(low.right) + at, inside);
    return load32(static_cast<const BF16*>(low.right) + at, inside);
}

// Adds the low-rank update of rows first + i, i < m, and columns column + r * apart, r < rows.
template <int m, int rows>
void add_low_rank_dots(const LowRank& low, int64_t first, int64_t column, int64_t apart, __m512 (&sum)[m][rows]) {
    const BF16* const left = static_cast<const BF16*>(low.left) + first * low.stride_left;
    for (int64_t k = 0; k < low.rank; k += 32) {
        for (int r = 0; r < rows; ++r) {
            const __m512bh b = as_bf16(low_rank_vector(low, column + r * apart, k));
            for (int i = 0; i < m; ++i) {
                const __m512bh a = as_bf16(_mm512_loadu_si512(left + i * low.stride_left + k));
                sum[i][r] = _mm512_dpbf16_ps(sum[i][r], a, b);
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

// Columns column + r * apart, r < rows, of rows first + i, i < m.
template <int m, int rows>
void write_dots(const Gemm& g, int64_t first, int64_t column, int64_t apart, const __m512 (&sum)[m][rows]) {
    constexpr int kSums = m * rows;
    static_assert(kSums <= 16, "one vector");
    __m512 lanes[16];
    alignas(64) float bias[16] = {};
    for (int i = 0; i < 16; ++i) lanes[i] = i < kSums ? sum[i / rows][i % rows] : _mm512_setzero_ps();
    if (g.bias) {
        for (int i = 0; i < kSums; ++i) bias[i] = to_float(static_cast<const BF16*>(g.bias)[column + i % rows * apart]);
    }
    alignas(32) BF16 y[16];
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_add_ps(sums_of_lanes(lanes), _mm512_load_ps(bias)));
    _mm256_store_si256(reinterpret_cast<__m256i*>(y), reinterpret_cast<__m256i>(rounded));
    BF16* const out = static_cast<BF16*>(g.out) + first * g.stride_out + column;
    for (int i = 0; i < kSums; ++i) out[i / rows * g.stride_out + i % rows * apart] = y[i];
}

// Rows first + i of y, i < m, and columns column + r * apart, r < rows, with K and the block size multiples of 64;
// x as pack_dots has it, from row `first` on.
template <int m, int rows>
void dot_aligned(const Gemm& g, const BF16* x, int64_t first, int64_t column, int64_t apart) {
    const Folded folded;
    __m512 sum[m][rows];
    for (int i = 0; i < m; ++i) {
        for (int r = 0; r < rows; ++r) sum[i][r] = _mm512_setzero_ps();
    }
    float buffer[rows][kDotSpan / 64];
    for (int64_t begin = 0; begin < g.k; begin += kDotSpan) {
        const int64_t groups = lesser(kDotSpan, g.k - begin) / 64;
        const uint8_t* packed[rows];
        const float* scales[rows];
        for (int r = 0; r < rows; ++r) {
            const int64_t at = (column + r * apart) * g.k + begin;
            packed[r] = g.w.packed + at / 2;
            scales[r] = buffer[r];
            if (g.w.absmax && g.w.block_size == 64) {
                scales[r] = g.w.absmax + at / 64;
            } else {
                scales_of_64(g.w, at, groups, buffer[r]);
            }
        }
        __m512i w[2][rows], next[2][rows];
        const auto decode = [&](int64_t group, __m512i(&to)[2][rows]) {
            for (int r = 0; r < rows; ++r) {
                const uint8_t* const from = packed[r] + 32 * group;
                const __m512i table = bf16_table(scales[r][group]), words = Folded::load(from);
                _mm_prefetch(reinterpret_cast<const char*>(from + kDotAhead), _MM_HINT_T0);
                for (int half = 0; half < 2; ++half) to[half][r] = folded.decode(table, words, half);
            }
        };
        decode(0, w);
        int64_t group = 0;
        do {
            decode(lesser(group + 1, groups - 1), next);
            const BF16* const from = x + (begin + 64 * group) * m;
            for (int half = 0; half < 2; ++half) {
                for (int i = 0; i < m; ++i) {
                    const __m512bh a = as_bf16(_mm512_load_si512(from + 32 * (half * m + i)));
                    for (int r = 0; r < rows; ++r) sum[i][r] = _mm512_dpbf16_ps(sum[i][r], a, as_bf16(w[half][r]));
                }
            }
            for (int half = 0; half < 2; ++half) {
                for (int r = 0; r < rows; ++r) w[half][r] = next[half][r];
            }
        } while (++group < groups);
    }
    if (g.low_rank) add_low_rank_dots(*g.low_rank, first, column, apart, sum);
    write_dots(g, first, column, apart, sum);
}

// Calls work(first row, rows) for tiles of nearly equal height, at most `most`.
template <class Work>
inline void row_tiles(int64_t m, int64_t most, Work work) {
    const int64_t tiles = ceil_div(m, most);
    for (int64_t i = 0; i < tiles; ++i) work(m * i / tiles, m * (i + 1) / tiles - m * i / tiles);
}

// x for dot_aligned: of each tile [K / 64, 2, rows, 32], folded.
inline void pack_dots(const Gemm& g, BF16* to) {
    row_tiles(g.m, kDotTile, [&](int64_t first, int64_t rows) {
        for (int64_t k = 0; k < g.k; k += 64, to += 64 * rows) {
            for (int64_t i = 0; i < rows; ++i) {
                const BF16* const from = static_cast<const BF16*>(g.a) + (first + i) * g.stride_a + k;
                const __m512i low = _mm512_loadu_si512(from), high = _mm512_loadu_si512(from + 32);
                for (int half = 0; half < 2; ++half) {
                    _mm512_store_si512(to + 32 * (half * rows + i), Folded::fold(low, high, half));
                }
            }
        }
    });
}

template <int rows>
void dot_columns(const Gemm& g, const BF16* x, int64_t column, int64_t apart) {
    row_tiles(g.m, kDotTile, [&](int64_t first, int64_t m) {
        const BF16* const from = x + first * g.k;
        switch (m) {
            case 1: return dot_aligned<1, rows>(g, from, first, column, apart);
            case 2: return dot_aligned<2, rows>(g, from, first, column, apart);
        }
        if constexpr (rows <= 3) {
            switch (m) {
                case 3: return dot_aligned<3, rows>(g, from, first, column, apart);
                case 4: return dot_aligned<4, rows>(g, from, first, column, apart);
            }
        }
        if constexpr (rows <= 2) {
            switch (m) {
                case 5: return dot_aligned<5, rows>(g, from, first, column, apart);
                case 6: return dot_aligned<6, rows>(g, from, first, column, apart);
                case 7: return dot_aligned<7, rows>(g, from, first, column, apart);
                case 8: return dot_aligned<8, rows>(g, from, first, column, apart);
            }
        }
    });
}

inline void dot_aligned_task(const Gemm& g, const BF16* x, int64_t task) {
    int64_t column = task * kDotColumns;
    const int64_t end = lesser(column + kDotColumns, g.n);
    const int together = g.m <= 2 ? 4 : g.m <= 4 ? 3 : 2;  // as many rows of W as the registers hold
    const int64_t apart = (end - column) / together;
    for (int64_t i = 0; i < apart; ++i, ++column) {
        switch (together) {
            case 2: dot_columns<2>(g, x, column, apart); break;
            case 3: dot_columns<3>(g, x, column, apart); break;
            case 4: dot_columns<4>(g, x, column, apart); break;
        }
    }
    for (column += (together - 1) * apart; column < end; ++column) dot_columns<1>(g, x, column, 0);
}

// Any K and block size: one row of W, by 32 elements that are aligned in W but not in x.
template <int m>
void dot_any(const Gemm& g, int64_t column) {
    __m512 sum[m][1];
    for (int i = 0; i < m; ++i) sum[i][0] = _mm512_setzero_ps();
    const BF16* const x = static_cast<const BF16*>(g.a);
    const int64_t begin = column * g.k, end = begin + g.k, n_bytes = (g.n * g.k + 1) / 2;
    int64_t i = begin / 32 * 32, block = i / g.w.block_size, block_end = block * g.w.block_size;
    const auto add = [&](__m512i w, int j, __m512i a) { sum[j][0] = _mm512_dpbf16_ps(sum[j][0], as_bf16(a), as_bf16(w)); };
    for (; i < end; ++block) {
        block_end += g.w.block_size;
        const __m512i table = bf16_table(nf4_absmax(g.w, block));
        for (; i < lesser(block_end, end); i += 32) {
            const BF16* const from = x + (i - begin);
            if (i >= begin && i + 32 <= end) {
                const __m512i w = decode32(table, g.w.packed + i / 2);
                for (int j = 0; j < m; ++j) add(w, j, _mm512_loadu_si512(from + j * g.stride_a));
                continue;
            }
            __mmask32 mask = ~__mmask32{0};  // of the elements of this row
            if (i < begin) mask = mask << (begin - i);
            if (end - i < 32) mask &= (__mmask32{1} << (end - i)) - 1;
            const __m512i w = _mm512_maskz_mov_epi16(mask, decode32(table, g.w.packed + i / 2, n_bytes - i / 2));
            for (int j = 0; j < m; ++j) add(w, j, _mm512_maskz_loadu_epi16(mask, from + j * g.stride_a));
        }
    }
    if (g.low_rank) add_low_rank_dots(*g.low_rank, 0, column, 0, sum);
    write_dots(g, 0, column, 0, sum);
}

template <int m>
void dot_any_task(const Gemm& g, int64_t task) {
    const int64_t end = lesser((task + 1) * kDotColumns, g.n);
    for (int64_t column = task * kDotColumns; column < end; ++column) dot_any<m>(g, column);
}

}  // namespace
}  // namespace lora_ops
