// The low-rank part of lora_linear, forward and backward, over one small matrix product.
//
// Every product here has the form C[i, j] += sum over p of L[i, p] R[p, j] with 32-bit elements: floats, or pairs of
// bfloat16 that are neighbours along the summed dimension. L is broadcast element by element; R and C are vectors:
//
//     S  = drop(x) A^T    i = m, j = r, p = k        y  += scale S B^T           i = m, j = n, p = r
//     dS = scale dY B     i = m, j = r, p = n        dX += mask (dS A)           i = m, j = k, p = r
//     dB^T = S^T dY       i = r, j = n, p = m        dA  = dS^T drop(x)          i = r, j = k, p = m
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
#include <type_traits>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "lora.h"
#include "philox.inl"
#include "scalar.h"

namespace lora_ops {
namespace {

constexpr int64_t kTileRows = 32, kTileColumns = kMaskColumns;
constexpr int64_t kLanes = 16;                 // R is padded to a multiple where it is the vector dimension
constexpr int64_t kBlock = 64;                 // columns of C that a product handles at once
constexpr int64_t kPrefetchRows = 8;           // how far ahead rows of y are fetched
constexpr int64_t kGroups = 8;                 // parts of the sum over n in dS, each of one thread
constexpr int64_t kFewRows = 4;                // up to which forward_few is faster (by 2 at M = 1, rank 16, 4096)
constexpr int64_t kSuperRows = 8 * kTileRows;  // rows between two barriers of the backward

// Terms that a product sums before it adds them to C. In one running sum of fp32 the error would grow with the root of
// all terms; torch's own products are blocked, too.
constexpr int64_t kTerms = 64;

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

inline int thread_number() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// V is an instruction set: V::F holds V::kWidth floats.
template <class V, int I, int J>
inline __attribute__((always_inline)) void tile_sums(int64_t count, const uint32_t* l, int64_t l_i, int64_t l_p,
                                                     const uint32_t* r, int64_t r_p, typename V::F (&sum)[I][J]) {
#pragma GCC unroll 16
    for (int i = 0; i < I; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) sum[i][j] = V::zero();
    }
    for (int64_t p = 0; p < count; ++p) {
        typename V::F right[J];
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) right[j] = V::load(r + p * r_p + j * V::kWidth);
#pragma GCC unroll 16
        for (int i = 0; i < I; ++i) {
            const typename V::F left = V::broadcast(l + i * l_i + p * l_p);
#pragma GCC unroll 4
            for (int j = 0; j < J; ++j) sum[i][j] = V::multiply_add(sum[i][j], left, right[j]);
        }
    }
}

template <class V, int I, int J>
inline void product_tile(int64_t count, const uint32_t* l, int64_t l_i, int64_t l_p, const uint32_t* r, int64_t r_p,
                         float* c, int64_t c_i, bool add) {
    typename V::F sum[I][J];
    tile_sums<V, I, J>(count, l, l_i, l_p, r, r_p, sum);
#pragma GCC unroll 16
    for (int i = 0; i < I; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) {
            float* const out = c + i * c_i + j * V::kWidth;
            V::store(out, add ? V::load(out) + sum[i][j] : sum[i][j]);
        }
    }
}

template <class V, int I, int J>
inline void product_columns(int64_t n_i, int64_t count, const uint32_t* l, int64_t l_i, int64_t l_p, const uint32_t* r,
                            int64_t r_p, float* c, int64_t c_i, bool add) {
    for (int64_t p = 0; p < count; p += kTerms) {
        for (int64_t i = 0; i < n_i; i += I) {
            product_tile<V, I, J>(std::min(kTerms, count - p), l + i * l_i + p * l_p, l_i, l_p, r + p * r_p, r_p,
                                  c + i * c_i, c_i, add || p > 0);
        }
    }
}

// C [n_i, n_j] (+)= L R. n_j is a multiple of kLanes, n_i one of 16, or of 4 if n_j is one of kBlock. AVX-512 tiles
// have 16 sums or more, which hides the latency of the multiply-add.
template <class V>
void product(int64_t n_i, int64_t n_j, int64_t count, const uint32_t* l, int64_t l_i, int64_t l_p, const uint32_t* r,
             int64_t r_p, float* c, int64_t c_i, bool add) {
    const auto columns = [&](auto tile, int64_t j) { tile(n_i, count, l, l_i, l_p, r + j, r_p, c + j, c_i, add); };
    int64_t j = 0;
    if constexpr (V::kWidth == 16) {
        for (; j + 64 <= n_j; j += 64) columns(product_columns<V, 4, 4>, j);
        if (n_j - j == 48) columns(product_columns<V, 8, 3>, j);
        if (n_j - j == 32) columns(product_columns<V, 8, 2>, j);
        if (n_j - j == 16) columns(product_columns<V, 16, 1>, j);
    } else {
        constexpr int kI = V::kWidth == 8 ? 4 : 2;
        for (; j < n_j; j += 16) columns(product_columns<V, kI, 16 / V::kWidth>, j);
    }
}

// out [columns, rows] = in [rows, columns]; rows is a multiple of 16, and in can be read up to 16 columns further.
template <class V>
void transpose(const uint32_t* in, int64_t in_row, int64_t rows, int64_t columns, uint32_t* out, int64_t out_row) {
    for (int64_t r = 0; r < rows; r += 16) {
        for (int64_t c = 0; c < columns; c += 16) {
            const int64_t n = std::min<int64_t>(16, columns - c);
            if constexpr (V::kWidth == 16) {
                V::transpose16(in + r * in_row + c, in_row, n, out + c * out_row + r, out_row);
            } else {
                for (int64_t j = c; j < c + n; ++j) {
                    for (int64_t i = r; i < r + 16; ++i) out[j * out_row + i] = in[i * in_row + j];
                }
            }
        }
    }
}

// The sum of a [n] b [n], n a multiple of 64, as the lanes of a vector.
template <class V>
typename V::F dot(const uint32_t* a, const uint32_t* b, int64_t n) {
    typename V::F sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    for (int64_t i = 0; i < n; i += 4 * V::kWidth) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const int64_t at = i + j * V::kWidth;
            sums[j] = V::multiply_add(sums[j], V::load(a + at), V::load(b + at));
        }
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class V>
float sum_of_lanes(typename V::F v) {
    float lanes[V::kWidth];
    V::store(lanes, v);
    for (int n = V::kWidth / 2; n > 0; n /= 2) {
        for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
    }
    return lanes[0];
}

// Calls work with p as a pointer to its element type.
template <class Work>
void with_type(const void* p, int dtype, Work work) {
    if (dtype == LORA_OPS_F32) work(static_cast<const float*>(p));
    if (dtype == LORA_OPS_F16) work(static_cast<const F16*>(p));
    if (dtype == LORA_OPS_BF16) work(static_cast<const BF16*>(p));
}

// Hands out aligned parts of a workspace. Without memory it only counts the bytes.
class Arena {
  public:
    explicit Arena(void* memory) : base_(static_cast<char*>(memory)) {}
    template <class T>
    T* take(int64_t n) {
        char* const here = base_ ? base_ + used_ : nullptr;
        used_ += static_cast<size_t>(round_up(n * static_cast<int64_t>(sizeof(T)), 64));
        return reinterpret_cast<T*>(here);
    }
    size_t used() const { return used_; }

  private:
    char* base_;
    size_t used_ = 0;
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

template <class V>
struct Lora {
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
        uint32_t* left;   // [kTileRows, lanes / kPair]
        uint8_t* bits;    // [kTileRows, kMaskBytes]

        size_t place(void* memory, int64_t lanes) {
            Arena arena(memory);
            tile = arena.take<uint32_t>(kTileRows * kTileElements);
            // Single floats are the same either way.
            pairs = kPair == 1 ? tile : arena.take<uint32_t>(kTileRows / kPair * kPairsRow);
            sums = arena.take<float>(kTileRows * lanes);
            left = arena.take<uint32_t>(kTileRows * lanes / kPair);
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

    // y [rows, n] += L R in columns [begin, end), at most kTileColumns, where the bits say so.
    template <class T>
    static void add_product(T* y, int64_t stride, int64_t rows, int64_t begin, int64_t end, int64_t count,
                            const uint32_t* left, int64_t left_row, const uint32_t* right, int64_t right_row,
                            const uint8_t* bits) {
        constexpr int kI = 4, kJ = V::kWidth == 16 ? 4 : 16 / V::kWidth, kColumns = kJ * V::kWidth;
        for (int64_t m = 0; m < rows; m += kI) {
            for (int64_t i = m + kPrefetchRows; i < std::min(rows, m + kPrefetchRows + kI); ++i) {
                prefetch(y + i * stride + begin, end - begin);
            }
            for (int64_t c = begin; c < end; c += kColumns) {
                typename V::F sum[kI][kJ];
                tile_sums<V, kI, kJ>(count, left + m * left_row, left_row, 1, right + c, right_row, sum);
                const uint8_t* const tile_bits = bits ? bits + m * kMaskBytes + (c - begin) / 8 : nullptr;
                T* const to = y + m * stride + c;
                if (m + kI <= rows && c + kColumns <= end) {
#pragma GCC unroll 4
                    for (int i = 0; i < kI; ++i) {
                        V::template add_row<kJ>(to + i * stride, sum[i], tile_bits ? tile_bits + i * kMaskBytes : nullptr);
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

    template <class T>
    static int forward_few(const LoraForward& f);
    template <class T>
    static int forward(const LoraForward& f);
    template <class T>
    static int backward(const LoraBackward& b);
};

inline float keep_scale(const lora_ops_adapter& adapter) {
    const uint32_t kept = 65536 - adapter.threshold;
    return kept ? static_cast<float>(65536.0 / kept) : 0.0f;
}

inline MaskKey mask_key(const lora_ops_adapter& adapter) {
    return MaskKey(adapter.seed, adapter.offset, adapter.threshold);
}

// The forward of a few rows, as in generation, where packing all of A and B would cost more than using them: S by dot
// products with A as it stands, split by rank; then B a block of rows at a time.
template <class V>
template <class T>
int Lora<V>::forward_few(const LoraForward& f) {
    static_assert(kPair == 1);
    const lora_ops_adapter& adapter = f.adapter;
    const int64_t n = adapter.n, k = adapter.k, r = adapter.r, lanes = round_up(r, kLanes);
    const int64_t k_padded = round_up(k, kTileColumns);
    const bool drop = adapter.threshold > 0;
    const float keep = keep_scale(adapter);
    const T* const x = static_cast<const T*>(f.x);
    T* const y = static_cast<T*>(f.y);

    struct Few {
        uint32_t *x, *tile, *right;
    };
    const auto place_few = [&](void* memory, Few& few) {
        Arena arena(memory);
        few.x = arena.take<uint32_t>(f.m * k_padded);
        few.tile = arena.take<uint32_t>(kBlock * kTileElements);
        few.right = arena.take<uint32_t>(r * kBlock);
        return arena.used();
    };
    Few sizes;
    const size_t few_bytes = place_few(nullptr, sizes);
    uint32_t* left;
    char* scratches;
    const auto place = [&](void* memory) {
        Arena arena(memory);
        left = arena.take<uint32_t>(round_up(f.m, 4) * lanes);
        scratches = arena.take<char>(static_cast<int64_t>(few_bytes) * f.n_threads);
        return arena.used();
    };
    void* const memory = lora_workspace(place(nullptr));
    if (!memory) return LORA_OPS_NO_MEMORY;
    place(memory);
    memset(left, 0, static_cast<size_t>(round_up(f.m, 4) * lanes) * sizeof *left);

#pragma omp parallel num_threads(f.n_threads)
    {
        Few my;
        place_few(scratches + few_bytes * static_cast<size_t>(thread_number()), my);
        typename V::Mask mask(mask_key(adapter));
        for (int64_t c = 0; c < k; c += kTileColumns) {
            if (drop) mask.start(c);
            for (int64_t i = 0; i < f.m; ++i) {
                uint8_t bits[kMaskBytes];
                if (drop) mask.row(i, bits);
                V::pack_row(x + i * f.x_stride + c, std::min(kTileColumns, k - c), drop ? bits : nullptr,
                            my.x + i * k_padded + c, kTileColumns);
            }
        }
#pragma omp for schedule(static)
        for (int64_t j = 0; j < r; ++j) {
            typename V::F sums[kFewRows];
            for (int64_t i = 0; i < f.m; ++i) sums[i] = V::zero();
            with_type(adapter.a, adapter.a_dtype, [&](auto* a) {
                for (int64_t c = 0; c < k; c += kTileColumns) {
                    const int64_t columns = std::min(kTileColumns, k - c), width = round_up(columns, 64);
                    V::pack_row(a + j * k + c, columns, nullptr, my.tile, width);
                    for (int64_t i = 0; i < f.m; ++i) sums[i] = sums[i] + dot<V>(my.tile, my.x + i * k_padded + c, width);
                }
            });
            for (int64_t i = 0; i < f.m; ++i) {
                const float s = sum_of_lanes<V>(sums[i]) * keep;
                f.s[i * r + j] = s;
                left[i * lanes + j] = float_bits(s * adapter.scale);
            }
        }
#pragma omp for schedule(static)
        for (int64_t first = 0; first < n; first += kBlock) {
            with_type(adapter.b, adapter.b_dtype, [&](auto* b) {
                for (int64_t c = 0; c < r; c += kTileColumns) {
                    pack_summed_columns(b, n, r, first, kBlock, c, my.right + c * kBlock, kBlock, my.tile);
                }
            });
            add_product(y + first, f.y_stride, f.m, 0, std::min(kBlock, n - first), r, left, lanes, my.right, kBlock,
                        static_cast<const uint8_t*>(nullptr));
        }
    }
    return LORA_OPS_OK;
}

template <class V>
template <class T>
int Lora<V>::forward(const LoraForward& f) {
    const lora_ops_adapter& adapter = f.adapter;
    const int64_t n = adapter.n, k = adapter.k, r = adapter.r, lanes = round_up(r, kLanes);
    const int64_t n_padded = round_up(n, kBlock);
    // Smaller tiles where whole ones would leave threads without work.
    const int64_t tile_rows = f.m >= kTileRows * f.n_threads ? kTileRows : kTileRows / 2;
    const bool drop = adapter.threshold > 0;
    const float keep = keep_scale(adapter);
    const T* const x = static_cast<const T*>(f.x);
    T* const y = static_cast<T*>(f.y);

    Scratch sizes;
    const size_t scratch_bytes = sizes.place(nullptr, lanes);
    uint32_t *a_panel, *b_panel;
    char* scratches;
    const auto place = [&](void* memory) {
        Arena arena(memory);
        a_panel = arena.take<uint32_t>(elements(k) * lanes);
        b_panel = arena.take<uint32_t>(elements(r) * n_padded);
        scratches = arena.take<char>(static_cast<int64_t>(scratch_bytes) * f.n_threads);
        return arena.used();
    };
    void* const memory = lora_workspace(place(nullptr));
    if (!memory) return LORA_OPS_NO_MEMORY;
    place(memory);

#pragma omp parallel num_threads(f.n_threads)
    {
        Scratch my;
        my.place(scratches + scratch_bytes * static_cast<size_t>(thread_number()), lanes);
        typename V::Mask mask(mask_key(adapter));
#pragma omp for schedule(static) nowait
        for (int64_t c = 0; c < k; c += kTileColumns) {
            with_type(adapter.a, adapter.a_dtype, [&](auto* a) {
                for (int64_t i = 0; i < lanes; i += kTileRows) {
                    pack_summed_columns(a, r, k, i, std::min(kTileRows, lanes - i), c,
                                        a_panel + c / kPair * lanes + i, lanes, my.tile);
                }
            });
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n_padded; i += kTileRows) {
            with_type(adapter.b, adapter.b_dtype, [&](auto* b) {
                for (int64_t c = 0; c < r; c += kTileColumns) {
                    pack_summed_columns(b, n, r, i, kTileRows, c, b_panel + c / kPair * n_padded + i, n_padded,
                                        my.tile);
                }
            });
        }
#pragma omp for schedule(static)
        for (int64_t m = 0; m < f.m; m += tile_rows) {
            const int64_t rows = std::min(tile_rows, f.m - m), padded_rows = round_up(rows, 16);
            for (int64_t c = 0; c < k; c += kTileColumns) {
                const int64_t columns = std::min(kTileColumns, k - c);
                if (drop) mask.start(c);
                for (int64_t i = 0; i < padded_rows; ++i) {
                    if (drop) mask.row(m + i, my.bits);
                    const T* const from = x + (m + i) * f.x_stride + c;
                    if (i < rows) prefetch(from + columns, std::min(kTileColumns, k - c - columns));
                    V::pack_row(from, i < rows ? columns : 0, drop ? my.bits : nullptr, my.tile + i * kTileElements,
                                kTileColumns);
                }
                // [rows, K] @ [K, R] -> [rows, R]
                product<V>(padded_rows, lanes, elements(columns), my.tile, kTileElements, 1,
                           a_panel + c / kPair * lanes, lanes, my.sums, lanes, c > 0);
            }
            for (int64_t i = 0; i < rows; ++i) {
                for (int64_t j = 0; j < r; ++j) {
                    const float s = my.sums[i * lanes + j] * keep;
                    f.s[(m + i) * r + j] = s;
                    my.sums[i * lanes + j] = s * adapter.scale;
                }
            }
            for (int64_t i = 0; i < padded_rows; ++i) {
                V::pack_row(my.sums + i * lanes, r, nullptr, my.left + i * lanes / kPair, lanes);
            }
            for (int64_t c = 0; c < n; c += kTileColumns) {
                // [rows, R] @ [R, N] -> [rows, N]
                add_product(y + m * f.y_stride, f.y_stride, rows, c, std::min(n, c + kTileColumns), elements(r),
                            my.left, lanes / kPair, b_panel, n_padded, static_cast<const uint8_t*>(nullptr));
            }
        }
    }
    return LORA_OPS_OK;
}

template <class V>
template <class T>
int Lora<V>::backward(const LoraBackward& g) {
    const lora_ops_adapter& adapter = g.adapter;
    const int64_t n = adapter.n, k = adapter.k, r = adapter.r, m_all = g.m, lanes = round_up(r, kLanes);
    const int64_t n_padded = round_up(n, kBlock), k_padded = round_up(k, kBlock);
    const bool drop = adapter.threshold > 0, needs_ds = g.da || g.dx, needs_sums = g.db || g.dbias;
    // A last row of ones beside S turns the product that gives dB into one that gives dbias, too.
    const int64_t b_rows = (g.db ? r : 0) + (g.dbias ? 1 : 0), b_lanes = round_up(b_rows, kLanes);
    const int64_t tiles_n = (n + kTileColumns - 1) / kTileColumns, groups = std::min(kGroups, tiles_n);
    const T *const dy = static_cast<const T*>(g.dy), *const x = static_cast<const T*>(g.x);
    T* const dx = static_cast<T*>(g.dx);

    Scratch sizes;
    const size_t scratch_bytes = sizes.place(nullptr, std::max(lanes, b_lanes));
    uint32_t *a_panel, *b_panel, *s_left, *ds_left, *ds_pairs;
    float *ds_parts, *da_sums, *db_sums;
    char* scratches;
    const auto place = [&](void* memory) {
        Arena arena(memory);
        a_panel = arena.take<uint32_t>(g.dx ? elements(r) * k_padded : 0);       // [R, K]
        b_panel = arena.take<uint32_t>(needs_ds ? elements(n) * lanes : 0);      // [N, R]
        s_left = arena.take<uint32_t>(kSuperRows / kPair * b_lanes);             // [rows, R]
        ds_left = arena.take<uint32_t>(kSuperRows * lanes / kPair);              // [rows, R], pairs along R
        ds_pairs = arena.take<uint32_t>(kSuperRows / kPair * lanes);             // [rows, R], pairs along rows
        ds_parts = arena.take<float>(needs_ds ? groups * kSuperRows * lanes : 0);
        da_sums = arena.take<float>(g.da ? round_up(r, 4) * k_padded : 0);       // [R, K]
        db_sums = arena.take<float>(round_up(b_rows, 4) * n_padded);             // [R, N]
        scratches = arena.take<char>(static_cast<int64_t>(scratch_bytes) * g.n_threads);
        return arena.used();
    };
    void* const memory = lora_workspace(place(nullptr));
    if (!memory) return LORA_OPS_NO_MEMORY;
    place(memory);

#pragma omp parallel num_threads(g.n_threads)
    {
        Scratch my;
        my.place(scratches + scratch_bytes * static_cast<size_t>(thread_number()), std::max(lanes, b_lanes));
        typename V::Mask mask(mask_key(adapter));
        if (g.dx) {
#pragma omp for schedule(static) nowait
            for (int64_t p = 0; p < elements(r); ++p) {
                with_type(adapter.a, adapter.a_dtype,
                          [&](auto* a) { pack_summed_rows(a, r, k, p, p + 1, a_panel, k_padded); });
            }
        }
        if (needs_ds) {
#pragma omp for schedule(static) nowait
            for (int64_t p = 0; p < elements(n); ++p) {
                with_type(adapter.b, adapter.b_dtype,
                          [&](auto* b) { pack_summed_rows(b, n, r, p, p + 1, b_panel, lanes); });
            }
        }
        for (int64_t m0 = 0; m0 < m_all; m0 += kSuperRows) {
            const int64_t rows_all = std::min(kSuperRows, m_all - m0);
            if (needs_sums) {
#pragma omp for schedule(static) nowait
                for (int64_t m = 0; m < rows_all; m += kTileRows) {
                    const int64_t rows = std::min(kTileRows, rows_all - m);
                    for (int64_t i = 0; i < rows; ++i) {
                        float* const row = my.sums + i * b_lanes;
                        for (int64_t j = 0; g.db && j < r; ++j) row[j] = g.s[(m0 + m + i) * r + j] * adapter.scale;
                        if (g.dbias) row[b_rows - 1] = 1.0f;
                    }
                    for (int64_t i = 0; i < rows; i += kPair) {
                        pack_together(my.sums + i * b_lanes, b_lanes, rows - i, b_rows, nullptr,
                                      s_left + (m + i) / kPair * b_lanes, b_lanes);
                    }
                }
            }
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t group = 0; group < groups; ++group) {
                float* const ds = ds_parts + group * kSuperRows * lanes;
                const int64_t first = tiles_n * group / groups, last = tiles_n * (group + 1) / groups;
                for (int64_t t = first; t < last; ++t) {
                    const int64_t c = t * kTileColumns, columns = std::min(kTileColumns, n - c);
                    for (int64_t m = 0; m < rows_all; m += kTileRows) {
                        const int64_t rows = std::min(kTileRows, rows_all - m), padded_rows = round_up(rows, 16);
                        const T* const from = dy + (m0 + m) * g.dy_stride + c;
                        for (int64_t i = kTileRows; i < std::min(2 * kTileRows, rows_all - m); ++i) {
                            prefetch(from + i * g.dy_stride, columns);
                        }
                        if (needs_ds || kPair == 1) {
                            for (int64_t i = 0; i < padded_rows; ++i) {
                                V::pack_row(from + i * g.dy_stride, i < rows ? columns : 0, nullptr,
                                            my.tile + i * kTileElements, kTileColumns);
                            }
                        }
                        if (needs_ds) {
                            // [rows, N] @ [N, R] -> [rows, R]
                            product<V>(padded_rows, lanes, elements(columns), my.tile, kTileElements, 1,
                                       b_panel + c / kPair * lanes, lanes, ds + m * lanes, lanes, t > first);
                        }
                        if (needs_sums) {
                            for (int64_t i = 0; i < rows && kPair > 1; i += kPair) {
                                pack_together(from + i * g.dy_stride, g.dy_stride, rows - i, columns, nullptr,
                                              my.pairs + i / kPair * kPairsRow, kTileColumns);
                            }
                            // [R, rows] @ [rows, N] -> [R, N]
                            product<V>(round_up(b_rows, 4), round_up(columns, kBlock), elements(rows),
                                       s_left + m / kPair * b_lanes, 1, b_lanes, my.pairs, kPairsRow, db_sums + c,
                                       n_padded, m0 + m > 0);
                        }
                    }
                }
            }
            if (!needs_ds) continue;
#pragma omp for schedule(static)
            for (int64_t m = 0; m < rows_all; m += kTileRows) {
                const int64_t rows = std::min(kTileRows, rows_all - m), padded_rows = round_up(rows, 16);
                for (int64_t i = 0; i < rows * lanes; ++i) {
                    float sum = 0.0f;
                    for (int64_t group = 0; group < groups; ++group) {
                        sum += ds_parts[(group * kSuperRows + m) * lanes + i];
                    }
                    my.sums[i] = sum * (adapter.scale * keep_scale(adapter));
                }
                for (int64_t i = 0; i < padded_rows; ++i) {
                    V::pack_row(my.sums + i * lanes, i < rows ? r : 0, nullptr, ds_left + (m + i) * lanes / kPair,
                                lanes);
                }
                for (int64_t i = 0; i < rows; i += kPair) {
                    pack_together(my.sums + i * lanes, lanes, rows - i, r, nullptr, ds_pairs + (m + i) / kPair * lanes,
                                  lanes);
                }
            }
#pragma omp for schedule(static) nowait
            for (int64_t c = 0; c < k; c += kTileColumns) {
                const int64_t columns = std::min(kTileColumns, k - c);
                if (drop) mask.start(c);
                for (int64_t m = 0; m < rows_all; m += kTileRows) {
                    const int64_t rows = std::min(kTileRows, rows_all - m);
                    for (int64_t i = kTileRows; i < std::min(2 * kTileRows, rows_all - m); ++i) {
                        if (g.da) prefetch(x + (m0 + m + i) * g.x_stride + c, columns);
                    }
                    for (int64_t i = 0; drop && i < rows; ++i) mask.row(m0 + m + i, my.bits + i * kMaskBytes);
                    if (g.da) {
                        for (int64_t i = 0; i < rows; i += kPair) {
                            pack_together(x + (m0 + m + i) * g.x_stride + c, g.x_stride, rows - i, columns,
                                          drop ? my.bits + i * kMaskBytes : nullptr,
                                          my.pairs + i / kPair * kPairsRow, kTileColumns);
                        }
                        // [R, rows] @ [rows, K] -> [R, K]
                        product<V>(round_up(r, 4), round_up(columns, kBlock), elements(rows),
                                   ds_pairs + m / kPair * lanes, 1, lanes, my.pairs, kPairsRow, da_sums + c,
                                   k_padded, m0 + m > 0);
                    }
                    if (g.dx) {
                        // [rows, R] @ [R, K] -> [rows, K]
                        add_product(dx + (m0 + m) * g.dx_stride, g.dx_stride, rows, c, c + columns, elements(r),
                                    ds_left + m * lanes / kPair, lanes / kPair, a_panel, k_padded,
                                    drop ? my.bits : nullptr);
                    }
                }
            }
        }
#pragma omp barrier
        if (g.da) {
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < r; ++i) {
                with_type(g.da, adapter.a_dtype, [&](auto* da) {
                    using A = std::remove_const_t<std::remove_pointer_t<decltype(da)>>;
                    for (int64_t c = 0; c < k; ++c) const_cast<A*>(da)[i * k + c] = round_to<A>(da_sums[i * k_padded + c]);
                });
            }
        }
        if (needs_sums) {
#pragma omp for schedule(static)
            for (int64_t first = 0; first < n; first += kBlock) {
                const int64_t end = std::min(n, first + kBlock);
                with_type(g.db, adapter.b_dtype, [&](auto* db) {
                    using B = std::remove_const_t<std::remove_pointer_t<decltype(db)>>;
                    for (int64_t i = 0; g.db && i < r; ++i) {
                        for (int64_t c = first; c < end; ++c) {
                            const_cast<B*>(db)[c * r + i] = round_to<B>(db_sums[i * n_padded + c]);
                        }
                    }
                });
                for (int64_t c = first; g.dbias && c < end; ++c) {
                    static_cast<T*>(g.dbias)[c] = round_to<T>(db_sums[(b_rows - 1) * n_padded + c]);
                }
            }
        }
    }
    return LORA_OPS_OK;
}

// The functions of an instruction set: bfloat16 activations are multiplied by VBF16, others as floats by V32.
template <class VBF16, class V32>
struct LoraEntry {
    static int forward(const LoraForward& f) {
        if (f.m <= kFewRows) {
            if (f.dtype == LORA_OPS_F32) return Lora<V32>::template forward_few<float>(f);
            if (f.dtype == LORA_OPS_F16) return Lora<V32>::template forward_few<F16>(f);
            return Lora<V32>::template forward_few<BF16>(f);
        }
        if (f.dtype == LORA_OPS_F32) return Lora<V32>::template forward<float>(f);
        if (f.dtype == LORA_OPS_F16) return Lora<V32>::template forward<F16>(f);
        return Lora<VBF16>::template forward<BF16>(f);
    }
    static int backward(const LoraBackward& g) {
        if (g.dtype == LORA_OPS_F32) return Lora<V32>::template backward<float>(g);
        if (g.dtype == LORA_OPS_F16) return Lora<V32>::template backward<F16>(g);
        return Lora<VBF16>::template backward<BF16>(g);
    }
};

}  // namespace
}  // namespace lora_ops
