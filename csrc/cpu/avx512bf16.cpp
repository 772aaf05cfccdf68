// AVX-512 BF16 and VBMI: products of bfloat16 activations and an NF4 or bfloat16 weight, low-rank update included.
// Everything else is avx512.cpp's.
//
// vdpbf16ps adds two products of bfloat16 to each of 16 fp32 sums; it reads denormals as zero, so that vcvtneps2bf16,
// which writes zero for them, loses nothing on the way to it.
#include <immintrin.h>
#include <string.h>

#include "gemm.h"
#include "kernels.h"
#include "load_avx512.inl"
#include "nf4_table.h"
#include "scalar.h"

#include "nf4.inl"
#include "gemm.inl"

namespace lora_ops {
namespace {

// The 16 products code * absmax of a block, rounded to nearest even; twice, so that an index's fifth bit is free.
inline __m512i bf16_table(float absmax) {
    const __m512 exact = _mm512_mul_ps(_mm512_loadu_ps(kNF4Code), _mm512_set1_ps(absmax));
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(exact, exact));
}

// Index of lane e of a quadword's 16 elements: the 8 bits from bit 8 * (e / 2) on, from 4 more where e is even. Of
// each 16-bit lane only the low 4 bits are a code; a permute ignores all but 5, and the fifth is free.
constexpr int16_t kShift[16] = {4, 0, 12, 8, 20, 16, 28, 24, 36, 32, 44, 40, 52, 48, 60, 56};

// 32 elements in order.
inline __m512i decode32(__m512i table, __m128i packed) {
    const __m512i quadwords = _mm512_setr_epi64(0, 0, 0, 0, 1, 1, 1, 1);
    const __m512i shifts = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kShift)));
    const __m512i codes = _mm512_permutexvar_epi64(quadwords, _mm512_castsi128_si512(packed));
    return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(shifts, codes), table);
}

inline __m512i decode32(__m512i table, const uint8_t* packed) {
    return decode32(table, _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
}

// The same where the tensor ends within the 16 bytes.
inline __m512i decode32(__m512i table, const uint8_t* packed, int64_t n_bytes) {
    const __mmask16 inside = n_bytes >= 16 ? 0xffff : static_cast<__mmask16>((1u << n_bytes) - 1);
    return decode32(table, _mm_maskz_loadu_epi8(inside, packed));
}

// 32 elements in an order that saves a permute: quadword 2 i of the result is elements 4 i to 4 i + 3 of the first 16,
// quadword 2 i + 1 the same of the last 16. Loads broadcast for free.
struct Mixed {
    __m512i shifts;
    Mixed() {
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kShift));
        const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kShift + 8));
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(high, low)),
                                                _mm256_set_m128i(high, low), 1);
        shifts = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3), both);
    }
    __m512i decode(__m512i table, const uint8_t* packed) const {
        const __m512i codes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
        return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(shifts, codes), table);
    }
    // Of the pair of elements in 32-bit lane i.
    static constexpr int pair(int i) { return 8 * (i / 2 % 2) + 2 * (i / 4) + i % 2; }
};

// Any 32 elements of x in that order.
inline __m512i mix(__m512i x) { return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), x); }

// Whether rows and blocks of W meet at multiples of 64 elements.
inline bool is_aligned(const Gemm& g) { return g.k % 64 == 0 && g.w.block_size % 64 == 0; }

// Decodes elements [begin, begin + n) and up to 31 before and after them, aligned to 32. Element begin is at the
// returned address. out has room for n + 62.
const uint16_t* decode_span(const Gemm& g, int64_t begin, int64_t n, uint16_t* out) {
    const int64_t first = begin / 32 * 32, last = begin + n;
    const int64_t n_bytes = (g.n * g.k + 1) / 2;
    const bool inside = (last + 31) / 32 * 16 <= n_bytes;
    int64_t block = first / g.w.block_size, block_end = block * g.w.block_size;
    for (int64_t i = first; i < last; ++block) {
        block_end += g.w.block_size;
        const int64_t end = lesser(block_end, last);
        const __m512i table = bf16_table(nf4_absmax(g.w, block));
        if (inside) {
            for (; i < end; i += 32) _mm512_storeu_si512(out + i - first, decode32(table, g.w.packed + i / 2));
        } else {
            for (; i < end; i += 32) {
                _mm512_storeu_si512(out + i - first, decode32(table, g.w.packed + i / 2, n_bytes - i / 2));
            }
        }
    }
    return out + (begin - first);
}

// Fetches the line of element i, if there is such an element.
inline void prefetch(const Gemm& g, int64_t i) {
    if (i < g.n * g.k) _mm_prefetch(reinterpret_cast<const char*>(g.w.packed + i / 2), _MM_HINT_T0);
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
    static constexpr bool kFuses = true;
    static constexpr int kRows = 6, kVectors = 4, kColumns = 16 * kVectors;  // 24 accumulators, 4 + 1 operands
    static constexpr int64_t kDepth = 4096;
    static constexpr int64_t kPanelBytes = kDepth * kColumns * 2;
    static constexpr int64_t kTileBytes = 0;
    static constexpr int64_t kAhead = 256;      // bytes of a row of W: the time that 16 rows of 512 weights take
    static constexpr int64_t kRowsAhead = 16;

    static void panel(const Gemm& g, int64_t column, int64_t begin, int64_t depth, void* panel) {
        if (g.dense) return dense_panel(g, column, begin, depth, static_cast<uint16_t*>(panel));
        if (is_aligned(g) && column + kColumns <= g.columns && depth % 64 == 0) {
            if (g.dx) return aligned_panel_of_columns(g, column, begin, depth, static_cast<uint16_t*>(panel));
            return aligned_panel_of_rows(g, column, begin, depth, static_cast<uint16_t*>(panel));
        }
        if (g.dx) return panel_of_columns(g, column, begin, depth, static_cast<uint16_t*>(panel));
        panel_of_rows(g, column, begin, depth, static_cast<uint16_t*>(panel));
    }

    static void aligned_panel_of_rows(const Gemm& g, int64_t column, int64_t begin, int64_t depth, uint16_t* panel) {
        const int64_t row_bytes = g.k / 2, ahead = kAhead < row_bytes ? kAhead : row_bytes;
        alignas(64) uint16_t buffer[16][64];
        float scales[16][kDepth / 64];
        const Mixed mixed;
        for (int vector = 0; vector < kVectors; ++vector) {
            const int64_t first = (column + 16 * vector) * g.k + begin;
            for (int i = 0; i < 16; ++i) scales_of_64(g.w, first + i * g.k, depth / 64, scales[i]);
            for (int64_t k = 0; k < depth; k += 64) {
                const uint8_t* packed = g.w.packed + (first + k) / 2;
                const uint8_t* soon = packed + ahead;
                if (begin + k + 2 * ahead >= g.k) soon += 15 * row_bytes;  // of the next 16 rows
                for (int i = 0; i < 16; ++i) {
                    if (k % 128 == 0) _mm_prefetch(reinterpret_cast<const char*>(soon + i * row_bytes), _MM_HINT_T0);
                    const __m512i table = bf16_table(scales[i][k / 64]);
                    _mm512_store_si512(buffer[i], mixed.decode(table, packed + i * row_bytes));
                    _mm512_store_si512(buffer[i] + 32, mixed.decode(table, packed + i * row_bytes + 16));
                }
                for (int half = 0; half < 2; ++half) {
                    __m512i r[16];
                    for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(buffer[i] + 32 * half);
                    transpose16(r);
                    uint16_t* to = panel + (k + 32 * half) * kColumns + 32 * vector;
                    for (int i = 0; i < 16; ++i) _mm512_store_si512(to + Mixed::pair(i) * 2 * kColumns, r[i]);
                }
            }
        }
    }

    static void aligned_panel_of_columns(const Gemm& g, int64_t column, int64_t begin, int64_t depth,
                                         uint16_t* panel) {
        const Mixed mixed;
        BlockWalk block(g.w, begin * g.k + column, g.k);
        for (int64_t i = 0; i < depth; i += 2) {
            __m512i row[2][2];
            for (int j = 0; j < 2; ++j) {
                const uint8_t* packed = g.w.packed + ((begin + i + j) * g.k + column) / 2;
                _mm_prefetch(reinterpret_cast<const char*>(packed + kRowsAhead * (g.k / 2)), _MM_HINT_T0);
                const __m512i table = bf16_table(nf4_absmax(g.w, block.next()));
                row[j][0] = mixed.decode(table, packed);
                row[j][1] = mixed.decode(table, packed + 16);
            }
            // Lane by lane, and back in order: elements 0-15 are the even quadwords.
            const __m512i low = _mm512_set_epi16(59, 27, 58, 26, 57, 25, 56, 24, 51, 19, 50, 18, 49, 17, 48, 16,  //
                                                 43, 11, 42, 10, 41, 9, 40, 8, 35, 3, 34, 2, 33, 1, 32, 0);
            const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(4));
            for (int half = 0; half < 2; ++half) {
                uint16_t* const to = panel + i * kColumns + 64 * half;
                _mm512_store_si512(to, _mm512_permutex2var_epi16(row[0][half], low, row[1][half]));
                _mm512_store_si512(to + 32, _mm512_permutex2var_epi16(row[0][half], high, row[1][half]));
            }
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

    static void dense_panel(const Gemm& g, int64_t column, int64_t begin, int64_t depth, uint16_t* panel) {
        const BF16* const w = static_cast<const BF16*>(g.dense);
        const int64_t columns = lesser(kColumns, g.columns - column), stride = g.stride_dense;
        if (g.dx) return copy_columns(w + begin * stride + column, stride, columns, depth, panel);
        copy_rows(w + column * stride + begin, stride, columns, depth, panel);
    }

    static void low_rank_panel(const Gemm& g, int64_t column, void* panel) {
        switch (g.low_rank->right_dtype) {
            case LORA_OPS_F32: return low_rank_panel_of<float>(g, column, static_cast<uint16_t*>(panel));
            case LORA_OPS_F16: return low_rank_panel_of<F16>(g, column, static_cast<uint16_t*>(panel));
            case LORA_OPS_BF16: return low_rank_panel_of<BF16>(g, column, static_cast<uint16_t*>(panel));
        }
    }

    template <class T>
    static void low_rank_panel_of(const Gemm& g, int64_t column, uint16_t* panel) {
        const T* const right = static_cast<const T*>(g.low_rank->right);
        const int64_t columns = lesser(kColumns, g.columns - column), rank = g.low_rank->rank;
        if (g.dx) return copy_columns(right + column, g.k, columns, rank, panel);
        copy_rows(right + column * rank, rank, columns, rank, panel);
    }

    // A panel whose columns are the first `columns` rows of w [columns, depth], rounded to bfloat16.
    template <class T>
    static void copy_rows(const T* w, int64_t stride, int64_t columns, int64_t depth, uint16_t* panel) {
        for (int vector = 0; vector < kVectors; ++vector) {
            const int64_t first = 16 * vector;
            for (int64_t k = 0; k < depth; k += 32) {
                const __mmask32 inside = first32(depth - k);
                __m512i r[16];
                for (int i = 0; i < 16; ++i) {
                    r[i] = first + i < columns ? load32(w + (first + i) * stride + k, inside) : _mm512_setzero_si512();
                }
                transpose16(r);
                uint16_t* const to = panel + k * kColumns + 32 * vector;
                for (int i = 0; i < 16 && k + 2 * i < depth; ++i) _mm512_store_si512(to + i * 2 * kColumns, r[i]);
            }
        }
    }

    // A panel whose columns are those of w [depth, columns].
    template <class T>
    static void copy_columns(const T* w, int64_t stride, int64_t columns, int64_t depth, uint16_t* panel) {
        for (int64_t i = 0; i < depth; i += 2) {
            for (int j = 0; j < kColumns; j += 32) {
                const __mmask32 inside = first32(columns - j);
                const T* const from = w + i * stride + j;
                const __m512i next = i + 1 < depth ? load32(from + stride, inside) : _mm512_setzero_si512();
                interleave(load32(from, inside), next, panel + i * kColumns + 2 * j);
            }
        }
    }

    // y: a column of the output is a row of W. Rows are decoded to L1, 16 at a time, and transposed by pairs.
    static void panel_of_rows(const Gemm& g, int64_t column, int64_t begin, int64_t depth, uint16_t* panel) {
        constexpr int64_t kSpan = 256, kRoom = kSpan + 64;
        alignas(64) uint16_t rows[16 * kRoom] = {};
        for (int vector = 0; vector < kVectors; ++vector) {
            for (int64_t k = 0; k < depth; k += kSpan) {
                const int64_t n = lesser(kSpan, depth - k);
                // What comes next: this row's next span but one, or the start of the rows after these 16.
                const int64_t ahead = begin + k + 2 * kSpan < g.k ? 2 * kSpan : 16 * g.k - begin - k;
                const uint16_t* row[16];
                for (int i = 0; i < 16; ++i) {
                    const int64_t at = column + 16 * vector + i;
                    row[i] = rows + i * kRoom;
                    if (at < g.n) {
                        const int64_t first = at * g.k + begin + k;
                        prefetch(g, first + ahead);
                        prefetch(g, first + ahead + 128);
                        row[i] = decode_span(g, first, n, rows + i * kRoom);
                    } else {
                        memset(rows + i * kRoom, 0, sizeof(uint16_t) * kRoom);
                    }
                }
                transpose_span(row, n, panel + k * kColumns + 32 * vector);
            }
        }
    }

    static void transpose_span(const uint16_t* const rows[16], int64_t n, uint16_t* to) {
        for (int64_t pair = 0; 2 * pair < n; pair += 16) {
            __m512i r[16];
            for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i] + 2 * pair);
            transpose16(r);
            if (2 * pair + 32 <= n) {
                for (int i = 0; i < 16; ++i) _mm512_store_si512(to + (pair + i) * 2 * kColumns, r[i]);
                continue;
            }
            for (int i = 0; 2 * (pair + i) < n; ++i) {
                // Of an odd depth's last pair the upper half is none of the sum's.
                if (2 * (pair + i) + 1 == n) r[i] = _mm512_and_si512(r[i], _mm512_set1_epi32(0xffff));
                _mm512_store_si512(to + (pair + i) * 2 * kColumns, r[i]);
            }
        }
    }

    // dX: a column of the output is a column of W. Two rows of W make a pair of terms.
    static void panel_of_columns(const Gemm& g, int64_t column, int64_t begin, int64_t depth, uint16_t* panel) {
        alignas(64) uint16_t rows[2][kColumns + 64] = {};
        const int64_t n = lesser(kColumns, g.k - column);
        for (int64_t i = 0; i < depth; i += 2) {
            const uint16_t* row[2];
            for (int j = 0; j < 2; ++j) {
                row[j] = rows[j];
                if (i + j < depth) {
                    const int64_t first = (begin + i + j) * g.k + column;
                    prefetch(g, first + kRowsAhead * g.k);
                    prefetch(g, first + kRowsAhead * g.k + n - 1);
                    row[j] = decode_span(g, first, n, rows[j]);
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
    static __attribute__((always_inline)) void add_products(__m512 (&sum)[rows][kVectors], const BF16* left,
                                                            int64_t stride, int64_t depth, const void* right) {
        const uint16_t* const panel = static_cast<const uint16_t*>(right);
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
        for (int64_t pair = 0; pair < depth / 2; ++pair) {
            step(pair, [&](int i) {
                int bits;
                memcpy(&bits, left + i * stride + 2 * pair, sizeof bits);
                return bits;
            });
        }
        if (depth % 2) step(depth / 2, [&](int i) { return int{left[i * stride + depth - 1].bits}; });
    }

    // With a mask apart from the other sums, which wait in the L1 cache.
    template <int rows>
    static __attribute__((always_inline)) void add_low_rank(__m512 (&sum)[rows][kVectors], const Tile<BF16>& t) {
        if (!t.bits) return add_products(sum, t.left, t.stride_left, t.rank, t.right);
        alignas(64) float base[rows][kColumns];
        for (int i = 0; i < rows; ++i) {
            for (int j = 0; j < kVectors; ++j) {
                _mm512_store_ps(base[i] + 16 * j, sum[i][j]);
                sum[i][j] = _mm512_setzero_ps();
            }
        }
        add_products(sum, t.left, t.stride_left, t.rank, t.right);
        for (int i = 0; i < rows; ++i) {
            uint16_t kept[kVectors];
            memcpy(kept, t.bits + i * t.stride_bits, sizeof kept);
            for (int j = 0; j < kVectors; ++j) {
                const __m512 from = _mm512_load_ps(base[i] + 16 * j);
                sum[i][j] = _mm512_mask_add_ps(from, kept[j], from, sum[i][j]);
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
        add_products(sum, t.a, t.stride_a, t.depth, t.panel);
        if (t.last && t.rank) add_low_rank(sum, t);

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
    for (int i = 0; i < m; ++i) {
        for (int r = 0; r < rows; ++r) write_dot(g, i, column + r * apart, sum[i][r]);
    }
}

// Any K and block size: one row of W, by 32 elements that are aligned in W but not in x.
template <int m>
void dot_any(const Gemm& g, int64_t column) {
    __m512 sum[m];
    for (int i = 0; i < m; ++i) sum[i] = _mm512_setzero_ps();
    const BF16* const x = static_cast<const BF16*>(g.a);
    const int64_t begin = column * g.k, end = begin + g.k, n_bytes = (g.n * g.k + 1) / 2;
    int64_t i = begin / 32 * 32, block = i / g.w.block_size, block_end = block * g.w.block_size;
    const auto add = [&](__m512i w, int j, __m512i a) { sum[j] = _mm512_dpbf16_ps(sum[j], as_bf16(a), as_bf16(w)); };
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
    for (int j = 0; j < m; ++j) write_dot(g, j, column, sum[j]);
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

bool takes_dots(const Gemm& g) { return !g.dx && !g.dense && !g.low_rank && g.m <= kMostDotRows; }

bool fuses(const Gemm& g) { return g.dtype == LORA_OPS_BF16 && (g.dx || g.dense || g.m > kMostDotRows); }

GemmPlan gemm_plan(const Gemm& g, int n_threads) {
    if (g.dtype != LORA_OPS_BF16) return kAvx512Gemm.plan(g, n_threads);
    if (takes_dots(g)) {
        GemmPlan plan = {};
        plan.tasks = ceil_div(g.n, kDotColumns);
        plan.dot = true;
        plan.shared_bytes = is_aligned(g) ? g.m * g.k * int64_t{sizeof(BF16)} : 0;
        return plan;
    }
    return panel_plan<Bf16Engine>(g, n_threads);
}

void gemm_prepare(const Gemm& g, const GemmPlan& plan, char* shared) {
    if (!plan.shared_bytes) return;
    BF16* const to = reinterpret_cast<BF16*>(shared);
    for (int64_t i = 0; i < g.m; ++i) {
        const BF16* const from = static_cast<const BF16*>(g.a) + i * g.stride_a;
        for (int64_t k = 0; k < g.k; k += 32) _mm512_store_si512(to + i * g.k + k, mix(_mm512_loadu_si512(from + k)));
    }
}

void gemm_task(const Gemm& g, const GemmPlan& plan, int64_t task, const char* shared, char* scratch) {
    if (g.dtype != LORA_OPS_BF16) return kAvx512Gemm.task(g, plan, task, shared, scratch);
    const BF16* const x = reinterpret_cast<const BF16*>(shared);
    if (!plan.dot) return panel_task<Bf16Engine, BF16>(g, plan, task, scratch);
    switch (g.m) {
        case 1: return dot_task<1>(g, x, task);
        case 2: return dot_task<2>(g, x, task);
        case 3: return dot_task<3>(g, x, task);
        case 4: return dot_task<4>(g, x, task);
        case 5: return dot_task<5>(g, x, task);
        case 6: return dot_task<6>(g, x, task);
        case 7: return dot_task<7>(g, x, task);
        case 8: return dot_task<8>(g, x, task);
    }
}

}  // namespace

const GemmKernels kAvx512Bf16Gemm = {gemm_plan, gemm_prepare, gemm_task, fuses};

}  // namespace lora_ops
