// AVX-512 BF16 and VBMI: products of bfloat16 activations and an NF4 weight. Everything else is avx512.cpp's.
//
// vdpbf16ps adds two products of bfloat16 to each of 16 fp32 sums; it reads denormals as zero, so that vcvtneps2bf16,
// which writes zero for them, loses nothing on the way to it.
#include <immintrin.h>
#include <string.h>

#include "gemm.h"
#include "kernels.h"
#include "nf4_table.h"
#include "scalar.h"

#include "nf4.inl"
#include "nf4_gemm.inl"

namespace lora_ops {
namespace {

// The 16 products code * absmax of a block, rounded to nearest even; twice, so that an index's fifth bit is free.
inline __m512i bf16_table(float absmax) {
    const __m512 exact = _mm512_mul_ps(_mm512_loadu_ps(kNF4Code), _mm512_set1_ps(absmax));
    return _mm512_broadcast_i64x4(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(exact)));
}

// 32 elements from quadwords `half` and `half + 1` of packed: the low 4 bits of each 16-bit lane are a code, in order.
template <int half>
inline __m512i codes32(__m512i packed) {
    const __m512i quadwords = _mm512_setr_epi64(half, half, half, half, half + 1, half + 1, half + 1, half + 1);
    // Lane e of a quadword's 16 takes the 8 bits from bit 8 * (e / 2) on, from 4 more where e is even.
    const __m512i shifts = _mm512_set_epi16(56, 60, 48, 52, 40, 44, 32, 36, 24, 28, 16, 20, 8, 12, 0, 4,  //
                                            56, 60, 48, 52, 40, 44, 32, 36, 24, 28, 16, 20, 8, 12, 0, 4);
    return _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi64(quadwords, packed));
}

inline __m512i decode32(__m512i table, const uint8_t* packed) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
    return _mm512_permutexvar_epi16(codes32<0>(_mm512_castsi128_si512(bytes)), table);
}

// 64 elements.
struct Codes64 {
    __m512i first, second;
    explicit Codes64(const uint8_t* packed) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
        first = codes32<0>(_mm512_castsi256_si512(bytes));
        second = codes32<2>(_mm512_castsi256_si512(bytes));
    }
};

// Whether rows and blocks of W meet at multiples of 64 elements.
inline bool is_aligned(const Nf4Gemm& g) { return g.k % 64 == 0 && g.w.block_size % 64 == 0; }

// The same where the tensor ends within the 16 bytes.
inline __m512i decode32(__m512i table, const uint8_t* packed, int64_t n_bytes) {
    if (n_bytes >= 16) return decode32(table, packed);
    const __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n_bytes) - 1), packed);
    return _mm512_permutexvar_epi16(codes32<0>(_mm512_castsi128_si512(bytes)), table);
}

// Decodes elements [begin, begin + n) and up to 31 before and after them, aligned to 32. Element begin is at the
// returned address. out has room for n + 62.
const uint16_t* decode_span(const Nf4Gemm& g, int64_t begin, int64_t n, uint16_t* out) {
    const int64_t first = begin / 32 * 32, last = begin + n;
    const int64_t n_bytes = (g.n * g.k + 1) / 2;
    int64_t block = first / g.w.block_size;
    for (int64_t i = first; i < last; ++block) {
        const int64_t block_end = lesser((block + 1) * g.w.block_size, last);
        const __m512i table = bf16_table(nf4_absmax(g.w, block));
        for (; i + 64 <= block_end; i += 64) {
            const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(g.w.packed + i / 2));
            const __m512i wide = _mm512_castsi256_si512(bytes);
            _mm512_storeu_si512(out + i - first, _mm512_permutexvar_epi16(codes32<0>(wide), table));
            _mm512_storeu_si512(out + i - first + 32, _mm512_permutexvar_epi16(codes32<2>(wide), table));
        }
        for (; i < block_end; i += 32) {
            _mm512_storeu_si512(out + i - first, decode32(table, g.w.packed + i / 2, n_bytes - i / 2));
        }
    }
    return out + (begin - first);
}

inline void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        const __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
        t[i] = _mm512_unpacklo_epi64(a, c);
        t[i + 1] = _mm512_unpackhi_epi64(a, c);
        t[i + 2] = _mm512_unpacklo_epi64(b, d);
        t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int i = 0; i < 4; ++i) {
        const __m512i a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
        r[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

inline __m512bh as_bf16(__m512i x) { return reinterpret_cast<__m512bh>(x); }

// A panel is [depth / 2, kColumns, 2]: the pairs of terms that vdpbf16ps adds are neighbours.
struct Bf16Engine {
    static constexpr int kRows = 6, kVectors = 4, kColumns = 16 * kVectors;  // 24 accumulators, 4 + 1 operands
    static constexpr int64_t kDepth = 4096;
    static constexpr int64_t kPanelBytes = kDepth * kColumns * 2;
    static constexpr int64_t kTileBytes = 0;
    static constexpr int64_t kAhead = 256;      // bytes of a row of W: the time that 16 rows of 512 weights take
    static constexpr int64_t kRowsAhead = 16;

    static void panel(const Nf4Gemm& g, int64_t column, int64_t begin, int64_t depth, void* panel) {
        if (is_aligned(g) && column + kColumns <= g.columns && depth % 64 == 0) {
            if (g.dx) return aligned_panel_of_columns(g, column, begin, depth, static_cast<uint16_t*>(panel));
            return aligned_panel_of_rows(g, column, begin, depth, static_cast<uint16_t*>(panel));
        }
        if (g.dx) return panel_of_columns(g, column, begin, depth, static_cast<uint16_t*>(panel));
        panel_of_rows(g, column, begin, depth, static_cast<uint16_t*>(panel));
    }

    static void aligned_panel_of_rows(const Nf4Gemm& g, int64_t column, int64_t begin, int64_t depth, uint16_t* panel) {
        const int64_t row_bytes = g.k / 2, ahead = kAhead < row_bytes ? kAhead : row_bytes;
        alignas(64) uint16_t buffer[16][64];
        for (int vector = 0; vector < kVectors; ++vector) {
            const int64_t first = (column + 16 * vector) * g.k + begin;
            for (int64_t k = 0; k < depth; k += 64) {
                const uint8_t* packed = g.w.packed + (first + k) / 2;
                const uint8_t* soon = packed + ahead;
                if (begin + k + 2 * ahead >= g.k) soon += 15 * row_bytes;  // of the next 16 rows
                for (int i = 0; i < 16; ++i) {
                    if (k % 128 == 0) _mm_prefetch(reinterpret_cast<const char*>(soon + i * row_bytes), _MM_HINT_T0);
                    const __m512i table = bf16_table(nf4_absmax(g.w, (first + i * g.k + k) / g.w.block_size));
                    const Codes64 codes(packed + i * row_bytes);
                    _mm512_store_si512(buffer[i], _mm512_permutexvar_epi16(codes.first, table));
                    _mm512_store_si512(buffer[i] + 32, _mm512_permutexvar_epi16(codes.second, table));
                }
                for (int half = 0; half < 2; ++half) {
                    __m512i r[16];
                    for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(buffer[i] + 32 * half);
                    transpose16(r);
                    uint16_t* to = panel + (k + 32 * half) * kColumns + 32 * vector;
                    for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 2 * kColumns, r[i]);
                }
            }
        }
    }

    static void aligned_panel_of_columns(const Nf4Gemm& g, int64_t column, int64_t begin, int64_t depth,
                                         uint16_t* panel) {
        for (int64_t i = 0; i < depth; i += 2) {
            __m512i row[2][2];
            for (int j = 0; j < 2; ++j) {
                const int64_t first = (begin + i + j) * g.k + column;
                const uint8_t* packed = g.w.packed + first / 2;
                _mm_prefetch(reinterpret_cast<const char*>(packed + kRowsAhead * (g.k / 2)), _MM_HINT_T0);
                const __m512i table = bf16_table(nf4_absmax(g.w, first / g.w.block_size));
                const Codes64 codes(packed);
                row[j][0] = _mm512_permutexvar_epi16(codes.first, table);
                row[j][1] = _mm512_permutexvar_epi16(codes.second, table);
            }
            for (int half = 0; half < 2; ++half) interleave(row[0][half], row[1][half], panel + i * kColumns + 64 * half);
        }
    }

    // Two rows of 32 -> 32 pairs.
    static void interleave(__m512i a, __m512i b, uint16_t* out) {
        const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,  //
                                             39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        _mm512_store_si512(out, _mm512_permutex2var_epi16(a, low, b));
        _mm512_store_si512(out + 32, _mm512_permutex2var_epi16(a, high, b));
    }

    // y: a column of the output is a row of W. Rows are decoded to L1, 16 at a time, and transposed by pairs.
    static void panel_of_rows(const Nf4Gemm& g, int64_t column, int64_t begin, int64_t depth, uint16_t* panel) {
        constexpr int64_t kSpan = 256, kRoom = kSpan + 64;
        alignas(64) uint16_t rows[16 * kRoom] = {};
        for (int64_t k = 0; k < depth; k += kSpan) {
            const int64_t n = lesser(kSpan, depth - k);
            for (int vector = 0; vector < kVectors; ++vector) {
                const uint16_t* row[16];
                for (int i = 0; i < 16; ++i) {
                    const int64_t at = column + 16 * vector + i;
                    row[i] = rows + i * kRoom;
                    if (at < g.n) {
                        row[i] = decode_span(g, at * g.k + begin + k, n, rows + i * kRoom);
                    } else {
                        memset(rows + i * kRoom, 0, sizeof(uint16_t) * kRoom);
                    }
                }
                uint16_t* to = panel + (k * kColumns + 32 * vector);
                for (int64_t pair = 0; 2 * pair < n; pair += 16) {
                    __m512i r[16];
                    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(row[i] + 2 * pair);
                    transpose16(r);
                    if (2 * pair + 32 <= n) {
                        for (int i = 0; i < 16; ++i) _mm512_store_si512(to + (pair + i) * 2 * kColumns, r[i]);
                    } else {
                        for (int i = 0; 2 * (pair + i) < n; ++i) {
                            // Of an odd depth's last pair the upper half is none of the sum's.
                            if (2 * (pair + i) + 1 == n) r[i] = _mm512_and_si512(r[i], _mm512_set1_epi32(0xffff));
                            _mm512_store_si512(to + (pair + i) * 2 * kColumns, r[i]);
                        }
                    }
                }
            }
        }
    }

    // dX: a column of the output is a column of W. Two rows of W make a pair of terms.
    static void panel_of_columns(const Nf4Gemm& g, int64_t column, int64_t begin, int64_t depth, uint16_t* panel) {
        alignas(64) uint16_t rows[2][kColumns + 64] = {};
        const int64_t n = lesser(kColumns, g.k - column);
        for (int64_t i = 0; i < depth; i += 2) {
            const uint16_t* row[2];
            for (int j = 0; j < 2; ++j) {
                row[j] = rows[j];
                if (i + j < depth) {
                    row[j] = decode_span(g, (begin + i + j) * g.k + column, n, rows[j]);
                } else {
                    memset(rows[j], 0, sizeof rows[j]);
                }
            }
            for (int j = 0; j < kColumns; j += 32) {
                interleave(_mm512_loadu_si512(row[0] + j), _mm512_loadu_si512(row[1] + j),
                           panel + i * kColumns + 2 * j);
            }
        }
    }

    template <int rows>
    static void tile(const Tile<BF16>& t, void*) {
        __m512 sum[rows][kVectors];
        for (int i = 0; i < rows; ++i) {
            for (int j = 0; j < kVectors; ++j) {
                sum[i][j] = t.first ? _mm512_setzero_ps() : _mm512_loadu_ps(t.sums + i * kColumns + 16 * j);
            }
        }
        const uint16_t* panel = static_cast<const uint16_t*>(t.panel);
        const auto step = [&](int64_t pair, const auto& a_pair) {
            __m512bh b[kVectors];
            for (int j = 0; j < kVectors; ++j) {
                b[j] = as_bf16(_mm512_load_si512(panel + (pair * kVectors + j) * 32));
            }
            for (int i = 0; i < rows; ++i) {
                const __m512bh a = as_bf16(_mm512_set1_epi32(a_pair(i)));
                for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], a, b[j]);
            }
        };
        for (int64_t pair = 0; pair < t.depth / 2; ++pair) {
            step(pair, [&](int i) {
                int bits;
                memcpy(&bits, t.a + i * t.stride_a + 2 * pair, sizeof bits);
                return bits;
            });
        }
        if (t.depth % 2) step(t.depth / 2, [&](int i) { return int{t.a[i * t.stride_a + t.depth - 1].bits}; });

        if (!t.last) {
            for (int i = 0; i < rows; ++i) {
                for (int j = 0; j < kVectors; ++j) _mm512_storeu_ps(t.sums + i * kColumns + 16 * j, sum[i][j]);
            }
            return;
        }
        for (int j = 0; j < kVectors && 16 * j < t.columns; ++j) {
            const int64_t left = t.columns - 16 * j;
            const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
            __m512 bias = _mm512_setzero_ps();
            if (t.bias) {
                const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, t.bias + 16 * j));
                bias = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
            }
            for (int i = 0; i < rows; ++i) {
                const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_add_ps(sum[i][j], bias));
                _mm256_mask_storeu_epi16(t.out + i * t.stride_out + 16 * j, mask, reinterpret_cast<__m256i>(rounded));
            }
        }
    }
};

// A few rows of x: every decoded vector of 32 weights is multiplied at once with all of them, along K, and dropped.
constexpr int kMostDotRows = 8;
constexpr int64_t kDotColumns = 32;  // rows of W in a task
constexpr int64_t kDotSpan = 4096;   // elements of a row whose scales are fetched at once

inline void write_dot(const Nf4Gemm& g, int64_t i, int64_t column, __m512 sums) {
    float sum = _mm512_reduce_add_ps(sums);
    if (g.bias) sum += to_float(static_cast<const BF16*>(g.bias)[column]);
    static_cast<BF16*>(g.out)[i * g.stride_out + column] = round_to<BF16>(sum);
}

// `rows` rows of W, with K and the block size multiples of 64.
template <int m, int rows>
void dot_aligned(const Nf4Gemm& g, int64_t column) {
    __m512 sum[m][rows];
    for (int i = 0; i < m; ++i) {
        for (int r = 0; r < rows; ++r) sum[i][r] = _mm512_setzero_ps();
    }
    alignas(64) float scales[rows][kDotSpan / 64];
    const BF16* const x = static_cast<const BF16*>(g.a);
    for (int64_t begin = 0; begin < g.k; begin += kDotSpan) {
        const int64_t n = lesser(kDotSpan, g.k - begin);
        for (int r = 0; r < rows; ++r) {
            const int64_t first = (column + r) * g.k + begin;
            if (g.w.block_size == 64) {
                nf4_scales(g.w, first / 64, n / 64, scales[r]);
            } else {
                for (int64_t i = 0; i < n / 64; ++i) scales[r][i] = nf4_absmax(g.w, (first + 64 * i) / g.w.block_size);
            }
        }
        const uint8_t* const packed = g.w.packed + (column * g.k + begin) / 2;
        for (int64_t k = 0; k < n; k += 64) {
            __m512bh w[rows][2];
            for (int r = 0; r < rows; ++r) {
                const __m512i table = bf16_table(scales[r][k / 64]);
                const uint8_t* const from = packed + (r * g.k + k) / 2;
                if (k % 128 == 0) _mm_prefetch(reinterpret_cast<const char*>(from + rows * g.k / 2), _MM_HINT_T0);
                const Codes64 codes(from);
                w[r][0] = as_bf16(_mm512_permutexvar_epi16(codes.first, table));
                w[r][1] = as_bf16(_mm512_permutexvar_epi16(codes.second, table));
            }
            for (int i = 0; i < m; ++i) {
                const BF16* from = x + i * g.stride_a + begin + k;
                for (int half = 0; half < 2; ++half) {
                    const __m512bh a = as_bf16(_mm512_loadu_si512(from + 32 * half));
                    for (int r = 0; r < rows; ++r) sum[i][r] = _mm512_dpbf16_ps(sum[i][r], a, w[r][half]);
                }
            }
        }
    }
    for (int i = 0; i < m; ++i) {
        for (int r = 0; r < rows; ++r) write_dot(g, i, column + r, sum[i][r]);
    }
}

// Any K and block size: one row of W, by 32 elements that are aligned in W but not in x.
template <int m>
void dot_any(const Nf4Gemm& g, int64_t column) {
    __m512 sum[m];
    for (int i = 0; i < m; ++i) sum[i] = _mm512_setzero_ps();
    const BF16* const x = static_cast<const BF16*>(g.a);
    const int64_t begin = column * g.k, end = begin + g.k, n_bytes = (g.n * g.k + 1) / 2;
    for (int64_t i = begin / 32 * 32; i < end; i += 32) {
        const __m512i w = decode32(bf16_table(nf4_absmax(g.w, i / g.w.block_size)), g.w.packed + i / 2,
                                   n_bytes - i / 2);
        __mmask32 mask = ~__mmask32{0};  // of elements of this row
        if (i < begin) mask = mask << (begin - i);
        if (end - i < 32) mask &= (__mmask32{1} << (end - i)) - 1;
        const __m512bh inside = as_bf16(_mm512_maskz_mov_epi16(mask, w));
        for (int j = 0; j < m; ++j) {
            const __m512i a = _mm512_maskz_loadu_epi16(mask, x + j * g.stride_a + (i - begin));
            sum[j] = _mm512_dpbf16_ps(sum[j], as_bf16(a), inside);
        }
    }
    for (int j = 0; j < m; ++j) write_dot(g, j, column, sum[j]);
}

template <int m>
void dot_task(const Nf4Gemm& g, int64_t task) {
    constexpr int kTogether = m <= 2 ? 4 : 2;  // rows of W that share loads of x and hide latency
    int64_t column = task * kDotColumns;
    const int64_t end = lesser(column + kDotColumns, g.n);
    if (is_aligned(g)) {
        for (; column + kTogether <= end; column += kTogether) dot_aligned<m, kTogether>(g, column);
        for (; column < end; ++column) dot_aligned<m, 1>(g, column);
    }
    for (; column < end; ++column) dot_any<m>(g, column);
}

Nf4GemmPlan nf4_gemm_plan(const Nf4Gemm& g, int n_threads) {
    if (g.dtype != LORA_OPS_BF16) return kAvx512Gemm.plan(g, n_threads);
    if (!g.dx && g.m <= kMostDotRows) {
        Nf4GemmPlan plan = {};
        plan.tasks = ceil_div(g.n, kDotColumns);
        plan.dot = true;
        return plan;
    }
    return panel_plan<Bf16Engine>(g, n_threads);
}

void nf4_gemm_task(const Nf4Gemm& g, const Nf4GemmPlan& plan, int64_t task, char* scratch) {
    if (g.dtype != LORA_OPS_BF16) return kAvx512Gemm.task(g, plan, task, scratch);
    if (!plan.dot) return panel_task<Bf16Engine, BF16>(g, plan, task, scratch);
    switch (g.m) {
        case 1: return dot_task<1>(g, task);
        case 2: return dot_task<2>(g, task);
        case 3: return dot_task<3>(g, task);
        case 4: return dot_task<4>(g, task);
        case 5: return dot_task<5>(g, task);
        case 6: return dot_task<6>(g, task);
        case 7: return dot_task<7>(g, task);
        case 8: return dot_task<8>(g, task);
    }
}

}  // namespace

const Nf4GemmKernels kAvx512Bf16Gemm = {nf4_gemm_plan, nf4_gemm_task};

}  // namespace lora_ops
