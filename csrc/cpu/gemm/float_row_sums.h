// dX for a few rows of dY over a dense W, or y where its transpose lies in memory: what lies there by rows along y is added
// to y row by row, each scaled by an element of x. It is read once and in order, which is all that takes time.
#pragma once

#include <string.h>

#include "gemm/blocks.h"
#include "gemm/float_decode.h"

namespace lora_ops {
namespace {

constexpr int kMostFloatRowSums = 16;  // two sweeps over W; with more, panels pay

constexpr int64_t kRowSumsColumns = 512;  // of a task, at most

// Adds x_i w_i for terms [begin, begin + rows) to sums; w points to the task's first column.
template <class V, class T, int m, int rows>
void add_rows(const Gemm& g, const T* x, const T* w, int64_t begin, int64_t n, float (*sums)[kRowSumsColumns]) {
    using F = typename V::F;
    F x_rows[m][rows];
    const T* row[rows];
    for (int r = 0; r < rows; ++r) {
        row[r] = w + (begin + r) * g.stride_dense;
        for (int i = 0; i < m; ++i) {
            x_rows[i][r] = V::set1(to_float(x[i * g.stride_x + begin + r]));
        }
    }
    const auto add = [&](const F* w_row, int64_t j) {
        for (int i = 0; i < m; ++i) {
            F sum = V::load(sums[i] + j);
            for (int r = 0; r < rows; ++r) sum = V::fma(x_rows[i][r], w_row[r], sum);
            V::store(sums[i] + j, sum);
        }
    };
    F w_row[rows];
    int64_t j = 0;
    for (; j + V::kLanes <= n; j += V::kLanes) {
        for (int r = 0; r < rows; ++r) w_row[r] = V::load(row[r] + j);
        add(w_row, j);
    }
    if (j == n) return;
    for (int r = 0; r < rows; ++r) {
        float last[V::kLanes] = {};
        for (int64_t k = j; k < n; ++k) last[k - j] = to_float(row[r][k]);
        w_row[r] = V::load(last);
    }
    add(w_row, j);
}

template <class V, class T, int m>
void float_row_sums_task(const Gemm& g, int64_t first_row, int64_t column, int64_t n) {
    constexpr int64_t kChain = 64, kDepth = 1024;  // terms before they join sums, and the total, as in float_panels.h
    constexpr int kRows = 4;  // at a time: with more, loads and stores of the chain would matter less than registers
    alignas(64) float total[m][kRowSumsColumns] = {}, sums[m][kRowSumsColumns] = {}, chain[m][kRowSumsColumns] = {};
    const T* const w = static_cast<const T*>(g.dense) + column;
    const T* const x = static_cast<const T*>(g.x) + first_row * g.stride_x;
    const auto join = [&](float (*from)[kRowSumsColumns], float (*to)[kRowSumsColumns]) {
        for (int i = 0; i < m; ++i) {
            for (int64_t j = 0; j < n; j += V::kLanes) {
                V::store(to[i] + j, V::add(V::load(to[i] + j), V::load(from[i] + j)));
                V::store(from[i] + j, V::zero());
            }
        }
    };
    for (int64_t begin = 0; begin < g.depth; begin += kChain) {
        const int64_t end = lesser(begin + kChain, g.depth);
        int64_t k = begin;
        for (; k + kRows <= end; k += kRows) add_rows<V, T, m, kRows>(g, x, w, k, n, chain);
        for (; k < end; ++k) add_rows<V, T, m, 1>(g, x, w, k, n, chain);
        join(chain, sums);
        if (end % kDepth == 0 || end == g.depth) join(sums, total);
    }
    for (int i = 0; i < m; ++i) {
        T* const y = static_cast<T*>(g.y) + (first_row + i) * g.stride_y + column;
        for (int64_t j = 0; j < n; ++j) {
            y[j] = round_to<T>(total[i][j] + (g.bias ? to_float(static_cast<const T*>(g.bias)[column + j]) : 0.0f));
        }
    }
}

template <class V>
constexpr GemmRoute float_row_sums() {
    return {[](const Gemm& g) { return g.dense && !g.columns_are_rows() && g.m <= kMostFloatRowSums; },
            [](const Gemm& g, int n_threads) {
                GemmPlan plan = {};
                plan.task_rows = lesser(kRowSumsColumns, ceil_div(ceil_div(g.columns, 2 * int64_t{n_threads}), 64) * 64);
                plan.tasks = ceil_div(g.columns, plan.task_rows);
                return plan;
            },
            nullptr,
            [](const Gemm& g, const GemmPlan& plan, int64_t task, const char*, char*) {
                const int64_t column = task * plan.task_rows, n = lesser(plan.task_rows, g.columns - column);
                with_dtype(g.dtype, [&](auto type) {
                    using T = decltype(type);
                    row_tiles(g.m, 8, [&](int64_t row, int64_t rows) {
                        switch (rows) {
                            case 1: return float_row_sums_task<V, T, 1>(g, row, column, n);
                            case 2: return float_row_sums_task<V, T, 2>(g, row, column, n);
                            case 3: return float_row_sums_task<V, T, 3>(g, row, column, n);
                            case 4: return float_row_sums_task<V, T, 4>(g, row, column, n);
                            case 5: return float_row_sums_task<V, T, 5>(g, row, column, n);
                            case 6: return float_row_sums_task<V, T, 6>(g, row, column, n);
                            case 7: return float_row_sums_task<V, T, 7>(g, row, column, n);
                            default: return float_row_sums_task<V, T, 8>(g, row, column, n);
                        }
                    });
                });
            }};
}

}  // namespace
}  // namespace lora_ops
