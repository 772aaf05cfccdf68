// y for a few rows of x, or dX where Wᵀ lies in memory: rows of what lies there, decoded to the L1 cache where it is NF4,
// are multiplied along the depth.
#pragma once

#include "gemm/float_decode.h"

namespace lora_ops {
namespace {

constexpr int kMostFloatDotRows = 4;
constexpr int64_t kFloatDotColumns = 32;

template <class V, class T, int m>
void float_dot_task(const Gemm& g, int64_t task) {
    using F = typename V::F;
    constexpr int64_t kSpan = 512;
    constexpr int kUnroll = 2;
    alignas(64) float buffer[kSpan + 64];
    const T* const x = static_cast<const T*>(g.x);
    const int64_t end = lesser((task + 1) * kFloatDotColumns, g.columns);
    for (int64_t column = task * kFloatDotColumns; column < end; ++column) {
        F sum[m][kUnroll];
        float rest[m] = {};
        for (auto& row : sum) {
            for (F& s : row) s = V::zero();
        }
        const auto add = [&](const auto* w, int64_t begin, int64_t n) {
            int64_t k = 0;
            for (; k + kUnroll * V::kLanes <= n; k += kUnroll * V::kLanes) {
                for (int u = 0; u < kUnroll; ++u) {
                    const F w_u = V::load(w + k + u * V::kLanes);
                    for (int i = 0; i < m; ++i) {
                        sum[i][u] = V::fma(V::load(x + i * g.stride_x + begin + k + u * V::kLanes), w_u, sum[i][u]);
                    }
                }
            }
            for (; k < n; ++k) {
                for (int i = 0; i < m; ++i) rest[i] += to_float(x[i * g.stride_x + begin + k]) * to_float(w[k]);
            }
        };
        if (g.dense) add(static_cast<const T*>(g.dense) + column * g.stride_dense, 0, g.depth);
        for (int64_t begin = 0; !g.dense && begin < g.depth; begin += kSpan) {
            const int64_t n = lesser(kSpan, g.depth - begin);
            add(decode_floats<V, T>(g, column * g.k + begin, n, buffer), begin, n);
        }
        for (int i = 0; i < m; ++i) {
            float y = V::sum(V::add(sum[i][0], sum[i][1])) + rest[i];
            if (g.bias) y += to_float(static_cast<const T*>(g.bias)[column]);
            static_cast<T*>(g.y)[i * g.stride_y + column] = round_to<T>(y);
        }
    }
}

template <class V>
constexpr GemmRoute float_dots() {
    return {[](const Gemm& g) { return g.columns_are_rows() && g.m <= kMostFloatDotRows; },
            [](const Gemm& g, int) {
                GemmPlan plan = {};
                plan.tasks = ceil_div(g.columns, kFloatDotColumns);
                return plan;
            },
            nullptr,
            [](const Gemm& g, const GemmPlan&, int64_t task, const char*, char*) {
                with_dtype(g.dtype, [&](auto type) {
                    using T = decltype(type);
                    switch (g.m) {
                        case 1: return float_dot_task<V, T, 1>(g, task);
                        case 2: return float_dot_task<V, T, 2>(g, task);
                        case 3: return float_dot_task<V, T, 3>(g, task);
                        case 4: return float_dot_task<V, T, 4>(g, task);
                    }
                });
            }};
}

}  // namespace
}  // namespace lora_ops
