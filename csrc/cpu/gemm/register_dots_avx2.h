// y for few rows of x, with AVX2: products along K, with 8 sums of each that meet at the end. W is never transposed.
#pragma once

#include "gemm/blocks.h"
#include "gemm/gemm.h"
#include "nf4/groups_avx2.h"

namespace lora_ops {
namespace {

constexpr int64_t kMostRegisterDotRows = 24;  // more are faster in panels
constexpr int64_t kMostAtOnce = 4;            // rows of x that are multiplied with weights as they are decoded
constexpr int64_t kTogether = 3;              // rows of W that are multiplied at once with four of x, else
constexpr int64_t kDotColumns = 48;           // rows of W in a task
constexpr int64_t kDotSpan = 256;             // terms of such a pass: W's and those of 16 rows of x share the L1 cache
constexpr int64_t kDotAhead = 4096;           // bytes between a fetch and its use
constexpr int64_t kScalesSpan = 4096;         // elements of a row whose scales are fetched at once

// x [m, K] -> [K / 64, m, 64], each 64 in the order of a group of weights.
template <class T>
void pack_dots(const Gemm& g, float* to) {
    for (int64_t k = 0; k < g.k; k += 64) {
        for (int64_t i = 0; i < g.m; ++i, to += 64) {
            const T* const x = static_cast<const T*>(g.x) + i * g.stride_x + k;
            float wide[64];
            for (int j = 0; j < 64; j += 8) _mm256_storeu_ps(wide + j, load8(x + j));
#pragma GCC unroll 64
            for (int j = 0; j < 64; ++j) to[j] = wide[NF4Groups<T>::element(j / 8, j % 8)];
        }
    }
}

inline float sum_of_lanes(__m256 a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

template <class T>
void write_dot(const Gemm& g, int64_t row, int64_t column, __m256 sums) {
    const float bias = g.bias ? to_float(static_cast<const T*>(g.bias)[column]) : 0.0f;
    static_cast<T*>(g.y)[row * g.stride_y + column] = round_to<T>(sum_of_lanes(sums) + bias);
}

inline void fetch_line(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// Fetches the scales of n elements of W.
inline void fetch_scales(const Gemm& g, int64_t first, int64_t n) {
    const int64_t block = first / g.w.block_size, blocks = n / g.w.block_size;
    for (int64_t i = 0; i <= blocks; i += 16) {
        if (g.w.absmax) fetch_line(g.w.absmax + block + i);
        if (!g.w.absmax && i % 64 == 0) fetch_line(g.w.absmax_codes + block + i);
    }
}

// Fetches a span of W. Spans of rows lie too far apart for the hardware to foresee: without this 16 rows of x over 2048 x
// 2048 in L3 take 1.4 times as long.
inline void fetch_span(const Gemm& g, int64_t first) {
    for (int64_t i = 0; i < kDotSpan; i += 128) fetch_line(g.w.packed + (first + i) / 2);
    fetch_scales(g, first, kDotSpan);
}

// What the groups of up to kSpan elements of W need.
template <class T, int64_t kSpan>
struct GroupTables {
    float scales[kSpan / 64];
    typename NF4Groups<T>::Table room[kSpan / 64];
    const typename NF4Groups<T>::Table* table;
    void fetch(const Gemm& g, int64_t first, int64_t groups) {
        table = NF4Groups<T>::tables(nf4_scales_of_64(g.w, first, groups, scales), groups, room);
    }
};

// A column of y for m rows of x: groups are multiplied as they are decoded. The sums of a group join the total at its end:
// in one chain over all of K they would be more wrong than torch's.
template <class T, int m>
void dots(const Gemm& g, const NF4Groups<T>& nf4, const float* x, int64_t column) {
    __m256 total[m];
    for (auto& t : total) t = _mm256_setzero_ps();
    GroupTables<T, kScalesSpan> tables;
    for (int64_t begin = 0; begin < g.k; begin += kScalesSpan) {
        const int64_t groups = lesser(kScalesSpan, g.k - begin) / 64, first = column * g.k + begin;
        fetch_scales(g, first + 2 * kDotAhead, 64 * groups);
        tables.fetch(g, first, groups);
        const uint8_t* packed = g.w.packed + first / 2;
        for (int64_t group = 0; group < groups; ++group, packed += 32, x += 64 * m) {
            fetch_line(packed + kDotAhead);
            __m256 w[8], sum[m];
            nf4.decode(packed, tables.table[group], w);
            for (int i = 0; i < m; ++i) sum[i] = _mm256_mul_ps(_mm256_load_ps(x + 64 * i), w[0]);
            for (int v = 1; v < 8; ++v) {
                for (int i = 0; i < m; ++i) sum[i] = _mm256_fmadd_ps(_mm256_load_ps(x + 64 * i + 8 * v), w[v], sum[i]);
            }
            for (int i = 0; i < m; ++i) total[i] = _mm256_add_ps(total[i], sum[i]);
        }
    }
    for (int i = 0; i < m; ++i) write_dot<T>(g, i, column, total[i]);
}

// sums[i][r] += the products of `groups` groups of row i of x, packed with m_all - 1 others, and of row r of w.
template <int m, int rows>
void dots_of_decoded(const float* x, int64_t m_all, const float* w, int64_t groups, __m256 (*sums)[kTogether]) {
    __m256 sum[m][rows];
    for (auto& row : sum) {
        for (auto& s : row) s = _mm256_setzero_ps();
    }
    for (int64_t group = 0; group < groups; ++group, x += 64 * m_all, w += 64) {
#pragma GCC unroll 2
        for (int v = 0; v < 64; v += 8) {
            __m256 w_v[rows];
            for (int r = 0; r < rows; ++r) w_v[r] = _mm256_load_ps(w + r * kDotSpan + v);
            for (int i = 0; i < m; ++i) {
                const __m256 x_i = _mm256_load_ps(x + 64 * i + v);
                for (int r = 0; r < rows; ++r) sum[i][r] = _mm256_fmadd_ps(x_i, w_v[r], sum[i][r]);
            }
        }
    }
    for (int i = 0; i < m; ++i) {
        for (int r = 0; r < rows; ++r) sums[i][r] = _mm256_add_ps(sums[i][r], sum[i][r]);
    }
}

// Terms [begin, begin + 64 groups) of columns [column, column + rows) of y, for all rows of x: W is decoded to the L1 cache.
template <class T, int rows>
void dots_of_rows(const Gemm& g, const NF4Groups<T>& nf4, const float* x, int64_t column, int64_t begin, int64_t groups,
                  __m256 (*sums)[kTogether]) {
    alignas(64) float w[rows * kDotSpan];
    GroupTables<T, kDotSpan> tables;
    for (int r = 0; r < rows; ++r) {
        const int64_t first = (column + r) * g.k + begin;
        tables.fetch(g, first, groups);
        fetch_span(g, first + kDotSpan);
        if (begin == 0) fetch_span(g, first + rows * g.k);
        for (int64_t group = 0; group < groups; ++group) {
            __m256 w_r[8];
            nf4.decode(g.w.packed + first / 2 + 32 * group, tables.table[group], w_r);
            for (int v = 0; v < 8; ++v) _mm256_store_ps(w + r * kDotSpan + 64 * group + 8 * v, w_r[v]);
        }
    }
    row_tiles(g.m, kMostAtOnce, [&](int64_t i, int64_t m) {
        const float* const x_i = x + 64 * i;
        switch (m) {
            case 1: return dots_of_decoded<1, rows>(x_i, g.m, w, groups, sums + i);
            case 2: return dots_of_decoded<2, rows>(x_i, g.m, w, groups, sums + i);
            case 3: return dots_of_decoded<3, rows>(x_i, g.m, w, groups, sums + i);
            case 4: return dots_of_decoded<4, rows>(x_i, g.m, w, groups, sums + i);
        }
    });
}

// Columns of y for more rows of x than are multiplied at once, a span of all of them after the other.
template <class T>
void many_dots(const Gemm& g, const NF4Groups<T>& nf4, const float* x, int64_t column, int64_t end, char* scratch) {
    auto* const sums = reinterpret_cast<__m256(*)[kTogether]>(scratch);  // [columns / kTogether, m]
    for (int64_t i = 0; i < kDotColumns / kTogether * g.m; ++i) {
        for (auto& s : sums[i]) s = _mm256_setzero_ps();
    }
    for (int64_t begin = 0; begin < g.k; begin += kDotSpan, x += kDotSpan * g.m) {
        const int64_t groups = lesser(kDotSpan, g.k - begin) / 64;
        auto* to = sums;
        for (int64_t c = column; c < end; c += kTogether, to += g.m) {
            switch (lesser(kTogether, end - c)) {
                case 1: dots_of_rows<T, 1>(g, nf4, x, c, begin, groups, to); break;
                case 2: dots_of_rows<T, 2>(g, nf4, x, c, begin, groups, to); break;
                case 3: dots_of_rows<T, 3>(g, nf4, x, c, begin, groups, to); break;
            }
        }
    }
    for (int64_t c = column; c < end; ++c) {
        const int64_t at = c - column;
        for (int64_t i = 0; i < g.m; ++i) write_dot<T>(g, i, c, sums[at / kTogether * g.m + i][at % kTogether]);
    }
}

template <class T>
void dot_task(const Gemm& g, const float* x, int64_t task, char* scratch) {
    const NF4Groups<T> nf4;
    const int64_t column = task * kDotColumns, end = lesser(column + kDotColumns, g.n);
    const auto columns = [&](auto dots) {
        for (int64_t c = column; c < end; ++c) dots(g, nf4, x, c);
    };
    switch (g.m) {
        case 1: return columns(dots<T, 1>);
        case 2: return columns(dots<T, 2>);
        case 3: return columns(dots<T, 3>);
        case 4: return columns(dots<T, 4>);
    }
    many_dots(g, nf4, x, column, end, scratch);
}

inline bool serves_register_dots(const Gemm& g) {
    return !g.dense && !g.dx && g.m <= kMostRegisterDotRows && g.k > 0 && g.k % 64 == 0 && g.w.block_size % 64 == 0;
}

inline GemmPlan plan_register_dots(const Gemm& g, int) {
    GemmPlan plan = {};
    plan.tasks = ceil_div(g.n, kDotColumns);
    plan.shared_bytes = g.m * g.k * int64_t{sizeof(float)};
    plan.scratch_bytes = g.m > kMostAtOnce ? kDotColumns * g.m * int64_t{sizeof(__m256)} : 0;
    return plan;
}

inline void prepare_register_dots(const Gemm& g, char* shared) {
    with_dtype(g.dtype, [&](auto type) { pack_dots<decltype(type)>(g, reinterpret_cast<float*>(shared)); });
}

inline void register_dots_task(const Gemm& g, const GemmPlan&, int64_t task, const char* shared, char* scratch) {
    const float* const x = reinterpret_cast<const float*>(shared);
    with_dtype(g.dtype, [&](auto type) { dot_task<decltype(type)>(g, x, task, scratch); });
}

}  // namespace
}  // namespace lora_ops
