// dX for one row of dY, with AVX2: rows of W are decoded in registers, scaled and added. A panel, which pays for more rows,
// is written and read again for nothing: it took 52 cycles for 64 weights in fp32, where this takes 18 (Zen 5).
#pragma once

#include "gemm/blocks.h"
#include "gemm/gemm.h"
#include "nf4/groups_avx2.h"

namespace lora_ops {
namespace {

constexpr int64_t kDxColumns = 128;  // of a task: a cache line of a row of W
constexpr int64_t kDxRows = 64;      // of W whose sums join the total together, as in panels

// total [8] += the sum of rows [begin, begin + rows) of W times dy, in columns [column, column + 64).
template <class T>
void add_rows_of_w(const Gemm& g, const NF4Groups<T>& nf4, const float* dy, int64_t column, int64_t begin, int64_t rows,
                   __m256* total) {
    float scales[kDxRows];
    typename NF4Groups<T>::Table room[kDxRows];
    BlockWalk walk(g.w, begin * g.k + column, g.k);
    for (int64_t i = 0; i < rows; ++i) scales[i] = nf4_absmax(g.w, walk.next());
    const auto* const tables = NF4Groups<T>::tables(scales, rows, room);
    const uint8_t* packed = g.w.packed + (begin * g.k + column) / 2;
    __m256 sum[8];
    for (auto& s : sum) s = _mm256_setzero_ps();
    for (int64_t i = 0; i < rows; ++i, packed += g.k / 2) {
        _mm_prefetch(reinterpret_cast<const char*>(packed + kDxRows * (g.k / 2)), _MM_HINT_T0);
        __m256 w[8];
        nf4.decode(packed, tables[i], w);
        const __m256 dy_i = _mm256_broadcast_ss(dy + i);
        for (int v = 0; v < 8; ++v) sum[v] = _mm256_fmadd_ps(dy_i, w[v], sum[v]);
    }
    for (int v = 0; v < 8; ++v) total[v] = _mm256_add_ps(total[v], sum[v]);
}

template <class T>
void one_row_dx(const Gemm& g, int64_t task) {
    const NF4Groups<T> nf4;
    const int64_t column = task * kDxColumns, groups = lesser(kDxColumns, g.k - column) / 64;
    __m256 total[kDxColumns / 64][8];
    for (auto& group : total) {
        for (auto& t : group) t = _mm256_setzero_ps();
    }
    for (int64_t begin = 0; begin < g.n; begin += kDxRows) {
        const int64_t rows = lesser(kDxRows, g.n - begin);
        float dy[kDxRows];
        for (int64_t i = 0; i < rows; ++i) dy[i] = to_float(static_cast<const T*>(g.x)[begin + i]);
        for (int64_t i = 0; i < groups; ++i) add_rows_of_w(g, nf4, dy, column + 64 * i, begin, rows, total[i]);
    }
    for (int64_t i = 0; i < groups; ++i) {
        T* const dx = static_cast<T*>(g.y) + column + 64 * i;
        for (int v = 0; v < 8; ++v) {
            float lanes[8];
            _mm256_storeu_ps(lanes, total[i][v]);
            for (int lane = 0; lane < 8; ++lane) dx[NF4Groups<T>::element(v, lane)] = round_to<T>(lanes[lane]);
        }
    }
}

inline bool serves_one_row_dx(const Gemm& g) {
    return !g.dense && g.dx && g.m == 1 && g.k % 64 == 0 && g.w.block_size % 64 == 0;
}

inline GemmPlan plan_one_row_dx(const Gemm& g, int) {
    GemmPlan plan = {};
    plan.tasks = ceil_div(g.k, kDxColumns);
    return plan;
}

inline void one_row_dx_task(const Gemm& g, const GemmPlan&, int64_t task, const char*, char*) {
    with_dtype(g.dtype, [&](auto type) { one_row_dx<decltype(type)>(g, task); });
}

}  // namespace
}  // namespace lora_ops
