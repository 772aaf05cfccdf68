// y for few rows of x in fp32 multiply-adds, with AVX-512: products along K, with 16 sums of each that meet at the end.
#pragma once

namespace lora_ops {
namespace {

// Two or four rows of W are decoded in registers and multiplied at once with up to eight rows of x. Decoding 16 weights
// takes a shift by lane and a permute: a load broadcasts their 8 bytes, and x is put in the order in which they come.
// Two Zen 4 cores, 4096 x 4096 in fp32, ms for 1, 4, 8 and 16 rows: 0.36, 0.91, 2.2, 3.9; decoded to L1 and multiplied
// there 1.03, 2.1, and in panels 4.5, 5.4.
constexpr int64_t kMostFloatDotRows = 24;   // more are faster in panels
constexpr int kFloatDotTile = 8;            // rows of x at once
constexpr int64_t kFloatDotColumns = 64;    // rows of W in a task
constexpr int64_t kFloatDotSpan = 4096;     // elements of a row whose scales are fetched at once
constexpr int64_t kFloatDotAhead = 4096;    // bytes between a fetch and its use

// Lane l holds element 8 (l % 2) + l / 2.
struct Dealt {
    __m512i shift, element;
    Dealt() {
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

// x [m, K] -> of each tile [K / 16, rows, 16], dealt.
template <class T>
void pack_float_dots(const Gemm& g, float* to) {
    const Dealt dealt;
    row_tiles(g.m, kFloatDotTile, [&](int64_t first, int64_t rows) {
        for (int64_t k = 0; k < g.k; k += 16) {
            for (int64_t i = 0; i < rows; ++i, to += 16) {
                const __m512 x = Avx512Floats::load(static_cast<const T*>(g.a) + (first + i) * g.stride_a + k);
                _mm512_store_ps(to, _mm512_permutexvar_ps(dealt.element, x));
            }
        }
    });
}

// Rows first + i of y, i < m, and columns column + r * apart, r < rows; x as pack_float_dots has it, from row `first`.
template <class T, int m, int rows>
void float_dots(const Gemm& g, const float* x, int64_t first, int64_t column, int64_t apart) {
    const Dealt dealt;
    __m512 sum[m][rows];
    for (int i = 0; i < m; ++i) {
        for (int r = 0; r < rows; ++r) sum[i][r] = _mm512_setzero_ps();
    }
    float scales[rows][kFloatDotSpan / 64];
    for (int64_t begin = 0; begin < g.k; begin += kFloatDotSpan) {
        const int64_t groups = lesser(kFloatDotSpan, g.k - begin) / 64, first_of_row = column * g.k + begin;
        for (int r = 0; r < rows; ++r) scales_of_64(g.w, first_of_row + r * apart * g.k, groups, scales[r]);
        const uint8_t* packed = g.w.packed + first_of_row / 2;
        const int64_t bytes_apart = apart * (g.k / 2);
        for (int64_t group = 0; group < groups; ++group, packed += 32) {
            __m512 table[rows];
            for (int r = 0; r < rows; ++r) {
                table[r] = Avx512Floats::table<T>(scales[r][group]).value;
                const uint8_t* const ahead = packed + r * bytes_apart + kFloatDotAhead;
                _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
            }
            for (int part = 0; part < 4; ++part) {
                __m512 w[rows];
                for (int r = 0; r < rows; ++r) w[r] = dealt.decode(table[r], packed + r * bytes_apart + 8 * part);
                for (int i = 0; i < m; ++i, x += 16) {
                    const __m512 a = _mm512_load_ps(x);
                    for (int r = 0; r < rows; ++r) sum[i][r] = _mm512_fmadd_ps(a, w[r], sum[i][r]);
                }
            }
        }
    }
    for (int r = 0; r < rows; ++r) {
        const float bias = g.bias ? to_float(static_cast<const T*>(g.bias)[column + r * apart]) : 0.0f;
        T* const y = static_cast<T*>(g.out) + first * g.stride_out + column + r * apart;
        for (int i = 0; i < m; ++i) y[i * g.stride_out] = round_to<T>(_mm512_reduce_add_ps(sum[i][r]) + bias);
    }
}

template <class T, int rows>
void float_dot_columns(const Gemm& g, const float* x, int64_t column, int64_t apart) {
    row_tiles(g.m, kFloatDotTile, [&](int64_t first, int64_t m) {
        const float* const from = x + first * g.k;
        switch (m) {
            case 1: return float_dots<T, 1, rows>(g, from, first, column, apart);
            case 2: return float_dots<T, 2, rows>(g, from, first, column, apart);
            case 3: return float_dots<T, 3, rows>(g, from, first, column, apart);
            case 4: return float_dots<T, 4, rows>(g, from, first, column, apart);
        }
        if constexpr (rows <= 2) {
            switch (m) {
                case 5: return float_dots<T, 5, rows>(g, from, first, column, apart);
                case 6: return float_dots<T, 6, rows>(g, from, first, column, apart);
                case 7: return float_dots<T, 7, rows>(g, from, first, column, apart);
                case 8: return float_dots<T, 8, rows>(g, from, first, column, apart);
            }
        }
    });
}

template <class T>
void float_dot_task(const Gemm& g, const float* x, int64_t task) {
    int64_t column = task * kFloatDotColumns;
    const int64_t end = lesser(column + kFloatDotColumns, g.n);
    const int together = g.m <= 4 ? 4 : 2;  // as many rows of W as the registers hold
    const int64_t apart = (end - column) / together;
    for (int64_t i = 0; i < apart; ++i, ++column) {
        if (together == 4) float_dot_columns<T, 4>(g, x, column, apart);
        if (together == 2) float_dot_columns<T, 2>(g, x, column, apart);
    }
    for (column += (together - 1) * apart; column < end; ++column) float_dot_columns<T, 1>(g, x, column, 0);
}

// Calls work with a value of the activations' type.
template <class Work>
void with_type_of(const Gemm& g, Work work) {
    switch (g.dtype) {
        case LORA_OPS_F32: return work(float{});
        case LORA_OPS_F16: return work(F16{});
        case LORA_OPS_BF16: return work(BF16{});
    }
}

inline bool takes_float_dots(const Gemm& g) {
    return !g.dx && g.m <= kMostFloatDotRows && g.k > 0 && g.k % 64 == 0 && g.w.block_size % 64 == 0;
}

GemmPlan avx512_plan(const Gemm& g, int n_threads) {
    if (!takes_float_dots(g)) return f32_plan<Avx512Floats>(g, n_threads);
    GemmPlan plan = {};
    plan.tasks = ceil_div(g.n, kFloatDotColumns);
    plan.shared_bytes = g.m * g.k * int64_t{sizeof(float)};
    return plan;
}

void avx512_prepare(const Gemm& g, const GemmPlan&, char* shared) {
    if (!takes_float_dots(g)) return;
    with_type_of(g, [&](auto type) { pack_float_dots<decltype(type)>(g, reinterpret_cast<float*>(shared)); });
}

void avx512_task(const Gemm& g, const GemmPlan& plan, int64_t task, const char* shared, char* scratch) {
    if (!takes_float_dots(g)) return f32_task<Avx512Floats>(g, plan, task, shared, scratch);
    with_type_of(g, [&](auto type) {
        float_dot_task<decltype(type)>(g, reinterpret_cast<const float*>(shared), task);
    });
}

}  // namespace
}  // namespace lora_ops
