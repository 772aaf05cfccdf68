// NF4 quantize of a transposed matrix, band by band, and dequantize into one, tile by tile in the L1 cache; written once
// for every instruction set. Blocks are those of W [n, k] in row-major order; the transpose [k, n] is what lies in memory.
//
// Parts supplies a vector V of kParts parts of 16 bytes:
//   V load(const char* p, int64_t stride)     its parts, stride bytes apart
//   void store(char* p, V)
//   V low<T>(V a, V b), V high<T>(V a, V b)   in each part, elements of a and b in turn: of the lower or the upper half
//   kStreams                                  whether stream(char* p, V), with finish() after the last, writes past the caches
#pragma once

#include <utility>

#include "nf4/codec.h"
#include "nf4/nf4.h"

namespace lora_ops {
namespace {

// A result this large is out of the caches before anybody reads it; to write it past them saves reading its lines first.
constexpr int64_t kStreamBytes = 4 << 20;

// Transposes kParts * kSide rows of kSide elements. A stage deals out the registers like a perfect shuffle of cards: it
// rotates the bits of an element's (row, column) by one, so log2(kSide) of them swap the two.
template <class Parts, bool streams, class T>
inline void transpose_block(const T* from, int64_t stride_from, T* out, int64_t stride_out) {
    constexpr int kSide = 16 / sizeof(T), kHalf = kSide / 2;
    const int64_t stride = stride_from * static_cast<int64_t>(sizeof(T));
    typename Parts::V r[kSide], t[kSide];
    for (int i = 0; i < kSide; ++i) r[i] = Parts::load(reinterpret_cast<const char*>(from) + i * stride, kSide * stride);
    for (int stage = 1; stage < kSide; stage *= 2) {
        for (int i = 0; i < kHalf; ++i) {
            t[2 * i] = Parts::template low<T>(r[i], r[i + kHalf]);
            t[2 * i + 1] = Parts::template high<T>(r[i], r[i + kHalf]);
        }
        for (int i = 0; i < kSide; ++i) r[i] = t[i];
    }
    for (int i = 0; i < kSide; ++i) {
        char* const to = reinterpret_cast<char*>(out + i * stride_out);
        if constexpr (streams) Parts::stream(to, r[i]);
        if constexpr (!streams) Parts::store(to, r[i]);
    }
}

// out[j * stride_out + i] = from[i * stride_from + j] for i < rows, j < columns. The last blocks overlap those before them.
template <class Parts, bool streams, class T>
void transpose(const T* from, int64_t stride_from, int64_t rows, int64_t columns, T* out, int64_t stride_out) {
    constexpr int64_t kColumns = 16 / sizeof(T), kRows = Parts::kParts * kColumns;
    if (rows < kRows || columns < kColumns) {
        for (int64_t j = 0; j < columns; ++j) {
            for (int64_t i = 0; i < rows; ++i) out[j * stride_out + i] = from[i * stride_from + j];
        }
        return;
    }
    for (int64_t column = 0; column < columns; column += kColumns) {
        const int64_t j = lesser(column, columns - kColumns);
        for (int64_t row = 0; row < rows; row += kRows) {
            const int64_t i = lesser(row, rows - kRows);
            transpose_block<Parts, streams>(from + i * stride_from + j, stride_from, out + j * stride_out + i, stride_out);
        }
    }
}

// A tile of W, decoded row by row. Tiles are numbered down the columns of W, so that a thread writes few rows of the
// transpose at a time, each of them in order.
template <class Vec, class T>
class NF4Tile {
public:
    static constexpr int64_t kRows = kNF4TileBytes / sizeof(T), kColumns = kNF4TileColumns;
    // Wherever a row of the tile begins and ends in W, it is decoded by whole vectors: up to 31 elements before and after
    // it go to the gap between two rows.
    static constexpr int64_t kGap = 32, kStride = kColumns + kGap;

    NF4Tile(const lora_ops_nf4_weight& w, int64_t n, int64_t k)
        : w_(w), n_(n), k_(k), blocks_of_row_(k / w.block_size), rest_of_row_(k % w.block_size) {}

    void start(int64_t tile) {
        const int64_t bands = ceil_div(n_, kRows);
        row = tile % bands * kRows;
        column = tile / bands * kColumns;
        rows = lesser(kRows, n_ - row);
        columns = lesser(kColumns, k_ - column);
        decoded_ = 0;
        first_ = row * k_ + column;
        block_ = first_ / w_.block_size;
        inside_ = first_ % w_.block_size;
    }

    // The next `count` rows, or as many as there are.
    void decode(int64_t count) {
        for (const int64_t end = lesser(decoded_ + count, rows); decoded_ < end; ++decoded_) {
            // Of the tile below: no hardware foresees a stride of a row.
            __builtin_prefetch(w_.packed + lesser(first_ + kRows * k_, n_ * k_ - 1) / 2);
            const int64_t early = first_ % 32, last = lesser(ceil_div(first_ + columns, 32) * 32, n_ * k_);
            nf4_dequantize<Vec>(w_, block_, first_ - early, last, values_ + kGap + decoded_ * kStride - early);
            // To divide for each row takes a third of its time.
            first_ += k_;
            block_ += blocks_of_row_;
            inside_ += rest_of_row_;
            if (inside_ >= w_.block_size) {
                inside_ -= w_.block_size;
                ++block_;
            }
        }
    }

    const T* values() const { return values_ + kGap; }  // [rows, kStride]

    int64_t row, column, rows, columns;

private:
    const lora_ops_nf4_weight& w_;
    const int64_t n_, k_, blocks_of_row_, rest_of_row_;
    int64_t decoded_, first_, block_, inside_;  // first_: the next row's first element; inside_: its place in its block
    alignas(64) T values_[kGap + kRows * kStride];
};

// Decodes the next tile while the stores of this one are on their way: streamed lines leave one every 16 cycles.
template <class Vec, class Parts, bool streams, class T>
void nf4_dequantize_tiles(const lora_ops_nf4_weight& w, int64_t n, int64_t k, int64_t begin, int64_t end, T* out) {
    using Tile = NF4Tile<Vec, T>;
    constexpr int64_t kStep = 8, kRowsOfStep = Tile::kRows * kStep / Tile::kColumns;
    Tile first(w, n, k), second(w, n, k);
    Tile *tile = &first, *next = &second;
    tile->start(begin);
    tile->decode(Tile::kRows);
    for (int64_t t = begin; t < end; ++t) {
        const bool is_last = t + 1 == end;
        if (!is_last) next->start(t + 1);
        for (int64_t j = 0; j < Tile::kColumns; j += kStep) {
            T* const to = out + (tile->column + j) * n + tile->row;
            const int64_t columns = lesser(kStep, tile->columns - j);
            transpose<Parts, streams>(tile->values() + j, Tile::kStride, tile->rows, columns, to, n);
            if (!is_last) next->decode(kRowsOfStep);
        }
        std::swap(tile, next);
    }
}

template <class Vec, class Parts, class T>
void nf4_dequantize_transposed(const lora_ops_nf4_weight& w, int64_t n, int64_t k, int64_t begin, int64_t end, T* out) {
    if constexpr (Parts::kStreams) {
        const int64_t row_bytes = n * static_cast<int64_t>(sizeof(T));
        if (row_bytes * k >= kStreamBytes && row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
            nf4_dequantize_tiles<Vec, Parts, true>(w, n, k, begin, end, out);
            return Parts::finish();
        }
    }
    nf4_dequantize_tiles<Vec, Parts, false>(w, n, k, begin, end, out);
}

// Blocks [begin, end) of W, flat; n * k is the end of the last one. They are quantized a band of rows at a time, which is
// put in order in `rows`: at least a block, and on to where a line of w ends.
template <class Vec, class Parts, class T>
bool nf4_quantize_transposed(const T* w, int64_t n, int64_t k, int64_t begin, int64_t end, int64_t block_size,
                             uint8_t* packed, float* absmax, T* rows) {
    constexpr int64_t kLine = 64 / sizeof(T), kStrip = 128;
    bool finite = true;
    while (begin < end) {
        const int64_t row = begin / k, line = ceil_div(ceil_div(begin + block_size, k), kLine) * kLine;
        const int64_t end_row = lesser(line, n), up_to = end_row < n ? end_row * k / block_size * block_size : n * k;
        const int64_t stop = lesser(up_to, end);
        for (int64_t column = 0; column < k; column += kStrip) {
            transpose<Parts, false>(w + column * n + row, n, lesser(kStrip, k - column), end_row - row, rows + column, k);
        }
        finite &= nf4_quantize<Vec>(rows + (begin - row * k), stop - begin, block_size, packed + begin / 2,
                                    absmax + begin / block_size);
        begin = stop;
    }
    return finite;
}

}  // namespace
}  // namespace lora_ops
