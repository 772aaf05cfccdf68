// y for few rows of x: products along K, with 16 sums of each that meet at the end. W is never transposed.
#pragma once

namespace lora_ops {
namespace {

// A few rows of x: every decoded vector of 32 weights is multiplied at once with all of them, along K, and dropped.
//
// What limits one row is how many lines of W are on their way from memory. Rows of W that are worked on together are
// therefore far apart, each the head of a stream of its own for the hardware's prefetcher, with a fetch ahead of it
// that reaches over the end of a row. 4096 x 4096 from memory on two Zen 5 cores: 0.20 ms with neighbouring rows, 0.14
// with streams, as from the cache; reading alone takes 0.08, decoding and multiplying 0.13.
constexpr int kMostDotRows = 8;
constexpr int64_t kDotColumns = 192;  // rows of W in a task: streams of 48 or 64
constexpr int64_t kDotSpan = 4096;    // elements of a row whose scales are fetched at once
constexpr int64_t kDotAhead = 4096;   // bytes between a fetch and its use

inline void write_dot(const Gemm& g, int64_t i, int64_t column, __m512 sums) {
    float sum = _mm512_reduce_add_ps(sums);
    if (g.bias) sum += to_float(static_cast<const BF16*>(g.bias)[column]);
    static_cast<BF16*>(g.out)[i * g.stride_out + column] = round_to<BF16>(sum);
}

// Elements [k, k + 32) of a row of B as bfloat16, zeros beyond its end.
inline __m512i low_rank_vector(const LowRank& low, int64_t row, int64_t k) {
    const int64_t at = row * low.rank + k;
    const __mmask32 inside = first32(low.rank - k);
    if (low.right_dtype == LORA_OPS_F32) return load32(static_cast<const float*>(low.right) + at, inside);
    if (low.right_dtype == LORA_OPS_F16) return load32(static_cast<const F16*>(low.right) + at, inside);
    return load32(static_cast<const BF16*>(low.right) + at, inside);
}

// Adds the low-rank update of columns column + r * apart, r < rows.
template <int m, int rows>
void add_low_rank_dots(const LowRank& low, int64_t column, int64_t apart, __m512 (&sum)[m][rows]) {
    const BF16* const left = static_cast<const BF16*>(low.left);
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

// Columns column + r * apart of y, r < rows, with K and the block size multiples of 64; x [m, K] is mixed.
template <int m, int rows>
void dot_aligned(const Gemm& g, const BF16* x, int64_t column, int64_t apart) {
    const Mixed mixed;
    __m512 sum[m][rows];
    for (int i = 0; i < m; ++i) {
        for (int r = 0; r < rows; ++r) sum[i][r] = _mm512_setzero_ps();
    }
    float buffer[rows][kDotSpan / 64];
    for (int64_t begin = 0; begin < g.k; begin += kDotSpan) {
        const int64_t n = lesser(kDotSpan, g.k - begin);
        const uint8_t* packed[rows];
        const float* scales[rows];
        for (int r = 0; r < rows; ++r) {
            const int64_t first = (column + r * apart) * g.k + begin;
            packed[r] = g.w.packed + first / 2;
            scales[r] = buffer[r];
            if (g.w.absmax && g.w.block_size == 64) {
                scales[r] = g.w.absmax + first / 64;
            } else {
                scales_of_64(g.w, first, n / 64, buffer[r]);
            }
        }
        for (int64_t group = 0; group < n / 64; ++group) {
            __m512bh w[rows][2];
            for (int r = 0; r < rows; ++r) {
                const __m512i table = bf16_table(scales[r][group]);
                const uint8_t* const from = packed[r] + 32 * group;
                if (group % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(from + kDotAhead), _MM_HINT_T0);
                w[r][0] = as_bf16(mixed.decode(table, from));
                w[r][1] = as_bf16(mixed.decode(table, from + 16));
            }
            for (int i = 0; i < m; ++i) {
                const BF16* from = x + i * g.k + begin + 64 * group;
                for (int half = 0; half < 2; ++half) {
                    const __m512bh a = as_bf16(_mm512_loadu_si512(from + 32 * half));
                    for (int r = 0; r < rows; ++r) sum[i][r] = _mm512_dpbf16_ps(sum[i][r], a, w[r][half]);
                }
            }
        }
    }
    if (g.low_rank) add_low_rank_dots(*g.low_rank, column, apart, sum);
    for (int i = 0; i < m; ++i) {
        for (int r = 0; r < rows; ++r) write_dot(g, i, column + r * apart, sum[i][r]);
    }
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
    if (g.low_rank) add_low_rank_dots(*g.low_rank, column, 0, sum);
    for (int j = 0; j < m; ++j) write_dot(g, j, column, sum[j][0]);
}

template <int m>
void dot_task(const Gemm& g, const BF16* x, int64_t task) {
    constexpr int kTogether = m <= 4 ? 4 : 3;  // rows of W that share loads of x and hide latency
    int64_t column = task * kDotColumns;
    const int64_t end = lesser(column + kDotColumns, g.n);
    if (is_aligned(g)) {
        const int64_t apart = (end - column) / kTogether;
        for (int64_t i = 0; i < apart; ++i) dot_aligned<m, kTogether>(g, x, column + i, apart);
        for (column += kTogether * apart; column < end; ++column) dot_aligned<m, 1>(g, x, column, 0);
    }
    for (; column < end; ++column) dot_any<m>(g, column);
}

}  // namespace
}  // namespace lora_ops
