// y for few rows of x in fp32 multiply-adds, with AVX-512: products along K, with 16 sums of each that meet at the end.
#pragma once

#include <string.h>

#include "gemm/blocks.h"
#include "gemm/floats_avx512.h"
#include "gemm/gemm.h"

namespace lora_ops {
namespace {

// Two or four rows of W are decoded in registers and multiplied at once with up to eight rows of x. Decoding 16 weights
// takes a shift by lane and a permute: a load broadcasts their 8 bytes, and x is put in the order in which they come.
// Two Zen 4 cores, 4096 x 4096 in fp32, ms for 1, 4, 8 and 16 rows: 0.36, 0.91, 2.2, 3.9; decoded to L1 and multiplied
// there 1.03, 2.1, and in panels 4.5, 5.4.
constexpr int64_t kMostRegisterDotRows = 24;   // more are faster in panels
constexpr int kDotTile = 8;            // rows of x at once
constexpr int64_t kDotColumns = 64;    // rows of W in a task
constexpr int64_t kDotSpan = 4096;     // elements of a row whose scales are fetched at once
constexpr int64_t kDotAhead = 4096;    // bytes between a fetch and its use

// The order in which 16 weights are decoded: lane l holds element 8 (l % 2) + l / 2.
struct Interleaved16 {
    __m512i shift, element;
    Interleaved16() {
        alignas(64) int32_t shifts[16], elements[16];
        for (int lane = 0; lane < 16; ++lane) {
            const int i = lane / 2;
            shifts[lane] = 8 * (i / 2) + (i % 2 ? 0 : 4);
            elements[lane] = 8 * (lane % 2) + i;
        }
        shift = _mm512_load_si512(shifts);
        element = _mm512_load_si512(elements);
    }
    // A permute ignores all but the lowest 4 bits of an index.
    __m512 decode(__m512 table, const uint8_t* packed) const {
        int64_t codes;
        memcpy(&codes, packed, sizeof codes);
        return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi64(codes), shift), table);
    }
};

// x [m, K] -> of each tile [K / 16, rows, 16], interleaved.
template <class T>
void pack_dots(const Gemm& g, float* to) {
    const Interleaved16 order;
    row_tiles(g.m, kDotTile, [&](int64_t first, int64_t rows) {
        for (int64_t k = 0; k < g.k; k += 16) {
            for (int64_t i = 0; i < rows; ++i, to += 16) {
                const __m512 x = Avx512Floats::load(static_cast<const T*>(g.x) + (first + i) * g.stride_x + k);
                _mm512_store_ps(to, _mm512_permutexvar_ps(order.element, x));
            }
        }
    });
}

// Rows first + i of y, i < m, and columns column + r * apart, r < rows; x as pack_dots has it, from row `first`.
template <class T, int m, int rows>
void dots(const Gemm& g, const float* x, int64_t first, int64_t column, int64_t apart) {
    const Interleaved16 order;
    __m512 sum[m][rows];
    for (int i = 0; i < m; ++i) {
        for (int r = 0; r < rows; ++r) sum[i][r] = _mm512_setzero_ps();
    }
    float scales[rows][kDotSpan / 64];
    for (int64_t begin = 0; begin < g.k; begin += kDotSpan) {
        const int64_t groups = lesser(kDotSpan, g.k - begin) / 64, first_of_row = column * g.k + begin;
        for (int r = 0; r < rows; ++r) scales_of_64(g.w, first_of_row + r * apart * g.k, groups, scales[r]);
        const uint8_t* packed = g.w.packed + first_of_row / 2;
        const int64_t bytes_apart = apart * (g.k / 2);
        for (int64_t group = 0; group < groups; ++group, packed += 32) {
            __m512 table[rows];
            for (int r = 0; r < rows; ++r) {
                table[r] = Avx512Floats::table<T>(scales[r][group]).value;
                const uint8_t* const ahead = packed + r * bytes_apart + kDotAhead;
                _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
            }
            for (int part = 0; part < 4; ++part) {
                __m512 w[rows];
                for (int r = 0; r < rows; ++r) w[r] = order.decode(table[r], packed + r * bytes_apart + 8 * part);
                for (int i = 0; i < m; ++i, x += 16) {
                    const __m512 a = _mm512_load_ps(x);
                    for (int r = 0; r < rows; ++r) sum[i][r] = _mm512_fmadd_ps(a, w[r], sum[i][r]);
                }
            }
        }
    }
    for (int r = 0; r < rows; ++r) {
        const float bias = g.bias ? to_float(static_cast<const T*>(g.bias)[column + r * apart]) : 0.0f;
        T* const y = static_cast<T*>(g.y) + first * g.stride_y + column + r * apart;
        for (int i = 0; i < m; ++i) y[i * g.stride_y] = round_to<T>(_mm512_reduce_add_ps(sum[i][r]) + bias);
    }
}

template <class T, int rows>
void dot_columns(const Gemm& g, const float* x, int64_t column, int64_t apart) {
    row_tiles(g.m, kDotTile, [&](int64_t first, int64_t m) {
        const float* const from = x + first * g.k;
        switch (m) {
            case 1: return dots<T, 1, rows>(g, from, first, column, apart);
            case 2: return dots<T, 2, rows>(g, from, first, column, apart);
            case 3: return dots<T, 3, rows>(g, from, first, column, apart);
            case 4: return dots<T, 4, rows>(g, from, first, column, apart);
        }
        if constexpr (rows <= 2) {
            switch (m) {
                case 5: return dots<T, 5, rows>(g, from, first, column, apart);
                case 6: return dots<T, 6, rows>(g, from, first, column, apart);
                case 7: return dots<T, 7, rows>(g, from, first, column, apart);
                case 8: return dots<T, 8, rows>(g, from, first, column, apart);
            }
        }
    });
}

template <class T>
void dot_task(const Gemm& g, const float* x, int64_t task) {
    int64_t column = task * kDotColumns;
    const int64_t end = lesser(column + kDotColumns, g.n);
    const int together = g.m <= 4 ? 4 : 2;  // as many rows of W as the registers hold
    const int64_t apart = (end - column) / together;
    for (int64_t i = 0; i < apart; ++i, ++column) {
        if (together == 4) dot_columns<T, 4>(g, x, column, apart);
        if (together == 2) dot_columns<T, 2>(g, x, column, apart);
    }
    for (column += (together - 1) * apart; column < end; ++column) dot_columns<T, 1>(g, x, column, 0);
}

inline bool serves_register_dots(const Gemm& g) {
    return !g.dense && !g.dx && g.m <= kMostRegisterDotRows && g.k > 0 && g.k % 64 == 0 && g.w.block_size % 64 == 0;
}

inline GemmPlan plan_register_dots(const Gemm& g, int) {
    GemmPlan plan = {};
    plan.tasks = ceil_div(g.n, kDotColumns);
    plan.shared_bytes = g.m * g.k * int64_t{sizeof(float)};
    return plan;
}

inline void prepare_register_dots(const Gemm& g, char* shared) {
    with_dtype(g.dtype, [&](auto type) { pack_dots<decltype(type)>(g, reinterpret_cast<float*>(shared)); });
}

inline void register_dots_task(const Gemm& g, const GemmPlan&, int64_t task, const char* shared, char*) {
    with_dtype(g.dtype, [&](auto type) {
        dot_task<decltype(type)>(g, reinterpret_cast<const float*>(shared), task);
    });
}

}  // namespace
}  // namespace lora_ops
