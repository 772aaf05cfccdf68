// The engine of panels.h for fp32 multiply-adds; x is widened a tile at a time.
#pragma once

#include <string.h>

#include "gemm/float_decode.h"
#include "gemm/panels.h"

namespace lora_ops {
namespace {

// A panel is [kParts, depth, kWidth].
template <class V, class T>
struct FloatEngine {
    static constexpr int kRows = V::kRows, kWidth = V::kVectors * V::kLanes, kColumns = 64, kParts = kColumns / kWidth;
    static constexpr bool kFuses = false;
    static constexpr int64_t kDepth = 1024;
    // Terms that are added one after the other before they join the total. A chain over all of K = 4096 is 4 times as
    // wrong as torch; chains of 64 are less wrong than torch from K = 256 to 14336.
    static constexpr int64_t kChain = 64;
    static constexpr int64_t kPanelBytes = kDepth * kColumns * 4;
    static constexpr int64_t kTileBytes = kRows * kDepth * 4;

    static void panel(const Gemm& g, int64_t column, int64_t begin, int64_t depth, void* panel) {
        float* const to = static_cast<float*>(panel);
        if (!g.columns_are_rows()) return columns(g, column, begin, depth, to);
        for (int part = 0; part < kParts; ++part) {
            part_of_rows(g, column + part * kWidth, begin, depth, to + part * depth * kWidth);
        }
    }

    static void part_of_rows(const Gemm& g, int64_t column, int64_t begin, int64_t depth, float* panel) {
        constexpr int64_t kSpan = 128, kRoom = kSpan + 64;
        alignas(64) float rows[V::kLanes * kRoom] = {};
        for (int64_t k = 0; k < depth; k += kSpan) {
            const int64_t n = lesser(kSpan, depth - k);
            for (int vector = 0; vector < V::kVectors; ++vector) {
                const float* row[V::kLanes];
                for (int i = 0; i < V::kLanes; ++i) {
                    const int64_t at = column + V::kLanes * vector + i;
                    row[i] = rows + i * kRoom;
                    if (at < g.columns) {
                        row[i] = row_floats<V, T>(g, at, begin + k, n, rows + i * kRoom);
                    } else {
                        memset(rows + i * kRoom, 0, sizeof(float) * kRoom);
                    }
                }
                float* const to = panel + k * kWidth + V::kLanes * vector;
                int64_t i = 0;
                for (; i + V::kLanes <= n; i += V::kLanes) V::transpose(row, i, to + i * kWidth, kWidth);
                for (; i < n; ++i) {
                    for (int lane = 0; lane < V::kLanes; ++lane) to[i * kWidth + lane] = row[lane][i];
                }
            }
        }
    }

    // A row of W at a time, of all parts: to decode one part after the other took 5 times as long with AVX2.
    static void columns(const Gemm& g, int64_t column, int64_t begin, int64_t depth, float* panel) {
        alignas(64) float room[kColumns + 64], row[kColumns] = {};
        const int64_t n = lesser(kColumns, g.columns - column);
        for (int64_t i = 0; i < depth; ++i) {
            const float* from = row_floats<V, T>(g, begin + i, column, n, room);
            if (n < kColumns) from = static_cast<float*>(memcpy(row, from, sizeof(float) * n));
            for (int part = 0; part < kParts; ++part) {
                memcpy(panel + (part * depth + i) * kWidth, from + part * kWidth, sizeof(float) * kWidth);
            }
        }
    }

    template <int rows>
    static void tile(const Tile<T>& t, void* scratch) {
        const float* x;
        int64_t stride_x;
        if constexpr (sizeof(T) == sizeof(float)) {
            x = t.x;
            stride_x = t.stride_x;
        } else {
            float* const wide = static_cast<float*>(scratch);
            for (int i = 0; i < rows; ++i) widen_floats<V>(t.x + i * t.stride_x, t.depth, wide + i * kDepth);
            x = wide;
            stride_x = kDepth;
        }
        for (int part = 0; part < kParts && part * kWidth < t.columns; ++part) {
            part_of_tile<rows>(t, x, stride_x, part * kWidth);
        }
    }

    template <int rows>
    static void part_of_tile(const Tile<T>& t, const float* x, int64_t stride_x, int64_t column) {
        using F = typename V::F;
        const float* const panel = static_cast<const float*>(t.panel) + column * t.depth;
        alignas(64) float total[rows][kWidth];
        for (int i = 0; i < rows; ++i) {
            for (float& sum : total[i]) sum = 0.0f;
        }
        for (int64_t begin = 0; begin < t.depth; begin += kChain) {
            const int64_t end = lesser(begin + kChain, t.depth);
            F sum[rows][V::kVectors];
            for (auto& row : sum) {
                for (F& s : row) s = V::zero();
            }
            for (int64_t k = begin; k < end; ++k) {
                F w[V::kVectors];
                for (int j = 0; j < V::kVectors; ++j) w[j] = V::load(panel + k * kWidth + j * V::kLanes);
                for (int i = 0; i < rows; ++i) {
                    const F x_i = V::set1(x[i * stride_x + k]);
                    for (int j = 0; j < V::kVectors; ++j) sum[i][j] = V::fma(x_i, w[j], sum[i][j]);
                }
            }
            for (int i = 0; i < rows; ++i) {
                for (int j = 0; j < V::kVectors; ++j) {
                    float* const at = total[i] + j * V::kLanes;
                    V::store(at, V::add(V::load(at), sum[i][j]));
                }
            }
        }
        for (int i = 0; i < rows; ++i) {
            // Chains join those of their panel before these join the panels before: one after the other, the 64 chains of
            // K = 4096 would round nearly the whole sum as often, which is 1.4 times as wrong as torch if its terms have
            // one sign.
            for (int j = 0; !t.first && j < kWidth; ++j) total[i][j] += t.sums[i * kColumns + column + j];
            if (t.last) {
                write(total[i], t.bias ? t.bias + column : nullptr, lesser(kWidth, t.columns - column),
                      t.y + i * t.stride_y + column);
            } else {
                memcpy(t.sums + i * kColumns + column, total[i], sizeof total[i]);
            }
        }
    }

    static void write(const float* sums, const T* bias, int64_t n, T* y) {
        int64_t i = 0;
        for (; i + V::kLanes <= n; i += V::kLanes) {
            V::store(y + i, V::add(V::load(sums + i), bias ? V::load(bias + i) : V::zero()));
        }
        for (; i < n; ++i) y[i] = round_to<T>(sums[i] + (bias ? to_float(bias[i]) : 0.0f));
    }
};

template <class V>
constexpr GemmRoute float_panels() {
    return {[](const Gemm&) { return true; }, panel_plan<FloatEngine<V, float>>, nullptr,
            [](const Gemm& g, const GemmPlan& plan, int64_t task, const char*, char* scratch) {
                with_dtype(g.dtype, [&](auto type) {
                    using T = decltype(type);
                    panel_task<FloatEngine<V, T>, T>(g, plan, task, scratch);
                });
            }};
}

}  // namespace
}  // namespace lora_ops
