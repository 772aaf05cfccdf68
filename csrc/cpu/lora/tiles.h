// What the passes over activations share, forward and backward: tiles, their packing, and one small matrix product.
//
// Every product here has 32-bit elements: floats, or pairs of bfloat16 that are neighbours along the summed dimension p.
// left is broadcast element by element; right and out are vectors of j:
//
//     S  = drop(x) Aᵀ     i = m, j = r, p = k        y  += scale S Bᵀ           i = m, j = n, p = r
//     dS = scale dY B     i = m, j = r, p = n        dX += mask (dS A)          i = m, j = k, p = r
//     dBᵀ = Sᵀ dY         i = r, j = n, p = m        dA  = dSᵀ drop(x)          i = r, j = k, p = m
//
// Activations are read once, in tiles of kTileRows x kTileColumns that are packed into the L1 cache: converted, masked
// and padded with zeros, so that the products know neither dtypes nor ragged edges. Packing costs a load and a store
// where rank 16 costs 16 multiply-adds, and takes the rows to where they do not fight for the same cache sets.
//
// Threads split rows where each row's result is its own, and columns where a sum runs over the rows (dA, dB). The sum
// over columns that threads share (dS) has kGroups fixed parts, added in their order. So results depend on neither the
// number of threads nor their timing.
#pragma once

#include <stdint.h>
#include <string.h>

#include <algorithm>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "common/scalar.h"
#include "lora/lora.h"
#include "lora/product.h"
#include "philox/philox.h"

namespace lora_ops {
namespace {

constexpr int64_t kTileRows = 32, kTileColumns = kMaskColumns;
constexpr int64_t kFewRows = 4;                // up to which forward_few.h is faster (by 2 at M = 1, rank 16, 4096)
constexpr int64_t kFewRowsOfS = 8;             // the same where it computes S alone
constexpr int64_t kPrefetchRows = 8;           // how far ahead rows of y are fetched
constexpr int64_t kGroups = 8;                 // parts of the sum over n in dS, each of one thread
constexpr int64_t kSuperRows = 8 * kTileRows;  // rows between two barriers of the backward
constexpr int64_t kSupers = 16;                // of them in a part of dbias

inline int thread_number() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Calls work with p as a pointer to its element type.
template <class Work>
void with_elements(const void* p, int dtype, Work work) {
    with_dtype(dtype, [&](auto type) { work(static_cast<const decltype(type)*>(p)); });
}

// Hands out aligned parts of a workspace. Without memory it only counts the bytes.
class Arena {
  public:
    explicit Arena(void* memory) : base_(static_cast<char*>(memory)) {}
    template <class T>
    T* take(int64_t n) {
        char* const here = base_ ? base_ + used_ : nullptr;
        used_ += round_up(n * static_cast<int64_t>(sizeof(T)), 64);
        return reinterpret_cast<T*>(here);
    }
    int64_t used() const { return used_; }

  private:
    char* base_;
    int64_t used_ = 0;
};

// Tiles are narrower than what the hardware's prefetcher wants to see before it starts.
template <class T>
inline void prefetch(const T* p, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + i, 1);
}

inline bool is_kept(const uint8_t* bits, int64_t column) { return !bits || bits[column / 8] >> column % 8 & 1; }

template <class T>
void add_elements(T* y, const float* sums, int64_t n, const uint8_t* bits) {
    for (int64_t c = 0; c < n; ++c) {
        if (is_kept(bits, c)) y[c] = round_to<T>(to_float(y[c]) + sums[c]);
    }
}

// V is an instruction set.
template <class V>
struct Tiles {
    static constexpr int64_t kPair = V::kPair;
    // Between rows of a packed tile. The 16 more are one cache line, which keeps 16 rows out of each other's cache
    // banks: 5 % of S at rank 16.
    static constexpr int64_t kTileElements = kTileColumns / kPair + 16;
    static constexpr int64_t kPairsRow = kPair == 1 ? kTileElements : kTileColumns;

    static int64_t elements(int64_t n) { return (n + kPair - 1) / kPair; }

    // What each thread has to itself.
    struct Scratch {
        uint32_t* tile;   // [kTileRows, kTileElements]: a tile, pairs along its rows
        uint32_t* pairs;  // [kTileRows / kPair, kPairsRow]: a tile, pairs along its columns
        float* sums;      // [kTileRows, lanes]
        float* parts;     // [part_rows, kTileColumns]: what the present kSuperRows add to dA or dB
        uint32_t* s;      // [kTileRows, lanes / kPair]: scale S of a tile
        uint8_t* bits;    // [kTileRows, kMaskBytes]

        int64_t place(void* memory, int64_t lanes, int64_t part_rows = 0) {
            Arena arena(memory);
            tile = arena.take<uint32_t>(kTileRows * kTileElements);
            // Single floats are the same either way.
            pairs = kPair == 1 ? tile : arena.take<uint32_t>(kTileRows / kPair * kPairsRow);
            sums = arena.take<float>(kTileRows * lanes);
            parts = arena.take<float>(part_rows * kTileColumns);
            s = arena.take<uint32_t>(kTileRows * lanes / kPair);
            bits = arena.take<uint8_t>(kTileRows * kMaskBytes);
            return arena.used();
        }
    };

    // kPair rows as one row of elements; rows that do not exist are zero.
    template <class T>
    static void pack_together(const T* x, int64_t stride, int64_t rows, int64_t n, const uint8_t* bits, uint32_t* out,
                              int64_t width) {
        if constexpr (kPair == 1) {
            V::pack_row(x, rows > 0 ? n : 0, bits, out, width);
        } else {
            V::pack_two_rows(x, rows > 0 ? n : 0, x + stride, rows > 1 ? n : 0, bits, out, width);
        }
    }

    // The right operand [elements(rows), out_row] of a product that sums over the rows of w [rows, columns].
    template <class T>
    static void pack_summed_rows(const T* w, int64_t rows, int64_t columns, int64_t begin, int64_t end, uint32_t* out,
                                 int64_t out_row) {
        for (int64_t p = begin; p < end; ++p) {
            pack_together(w + p * kPair * columns, columns, rows - p * kPair, columns, nullptr, out + p * out_row,
                          out_row);
        }
    }

    // As pack_summed_rows, but summing over the columns of w: the part of a tile, out [elements, out_row]. Of n_rows, a
    // multiple of 16, those that do not exist are zero.
    template <class T>
    static void pack_summed_columns(const T* w, int64_t rows, int64_t columns, int64_t row, int64_t n_rows,
                                    int64_t column, uint32_t* out, int64_t out_row, uint32_t* tile) {
        const int64_t n = std::min(kTileColumns, columns - column);
        for (int64_t i = 0; i < n_rows; ++i) {
            V::pack_row(w + (row + i) * columns + column, row + i < rows ? n : 0, nullptr, tile + i * kTileElements,
                        round_up(n, 2 * kLanes));
        }
        transpose<V>(tile, kTileElements, n_rows, elements(n), out, out_row);
    }

    // y [rows, n] += s factor in columns [begin, end), at most kTileColumns, where the bits say so.
    template <class T>
    static void add_product(T* y, int64_t stride, int64_t rows, int64_t begin, int64_t end, int64_t count,
                            const uint32_t* s, int64_t s_row, const uint32_t* factor, int64_t factor_row,
                            const uint8_t* bits) {
        constexpr int kI = 4, kJ = V::kWidth == 16 ? 4 : 16 / V::kWidth, kColumns = kJ * V::kWidth;
        for (int64_t m = 0; m < rows; m += kI) {
            for (int64_t i = m + kPrefetchRows; i < std::min(rows, m + kPrefetchRows + kI); ++i) {
                prefetch(y + i * stride + begin, end - begin);
            }
            for (int64_t c = begin; c < end; c += kColumns) {
                typename V::F sum[kI][kJ];
                tile_sums<V>(count, s + m * s_row, s_row, Fixed<1>(), factor + c, factor_row, sum);
                const uint8_t* const tile_bits = bits ? bits + m * kMaskBytes + (c - begin) / 8 : nullptr;
                T* const to = y + m * stride + c;
                if (m + kI <= rows && c + kColumns <= end) {
#pragma GCC unroll 4
                    for (int i = 0; i < kI; ++i) {
                        V::template add_row<kJ>(to + i * stride, sum[i],
                                                tile_bits ? tile_bits + i * kMaskBytes : nullptr);
                    }
                } else {
                    alignas(64) float edge[kI][kColumns];
                    for (int i = 0; i < kI; ++i) {
                        for (int j = 0; j < kJ; ++j) V::store(edge[i] + j * V::kWidth, sum[i][j]);
                    }
                    for (int64_t i = 0; i < std::min<int64_t>(kI, rows - m); ++i) {
                        add_elements(to + i * stride, edge[i], std::min<int64_t>(kColumns, end - c),
                                     tile_bits ? tile_bits + i * kMaskBytes : nullptr);
                    }
                }
            }
        }
    }
};

inline float keep_scale(const lora_ops_adapter& adapter) {
    const uint32_t kept = 65536 - adapter.threshold;
    return kept ? static_cast<float>(65536.0 / kept) : 0.0f;
}

inline MaskKey mask_key(const lora_ops_adapter& adapter) {
    return MaskKey(adapter.seed, adapter.offset, adapter.threshold);
}

}  // namespace
}  // namespace lora_ops
