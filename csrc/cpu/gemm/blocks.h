// NF4 blocks in the order in which products meet them, and rows of x in tiles.
#pragma once

#include "common/scalar.h"
#include "nf4/codec.h"

namespace lora_ops {
namespace {

// Calls work(first row, rows) for tiles of nearly equal height, at most `most`.
template <class Work>
inline void row_tiles(int64_t m, int64_t most, Work work) {
    const int64_t tiles = ceil_div(m, most);
    for (int64_t i = 0; i < tiles; ++i) work(m * i / tiles, m * (i + 1) / tiles - m * i / tiles);
}

// The blocks of elements `first`, `first` + step, `first` + 2 step ...
class BlockWalk {
  public:
    BlockWalk(const lora_ops_nf4_weight& w, int64_t first, int64_t step)
        : size_(w.block_size), blocks_(step / size_), rest_(step % size_), block_(first / size_), at_(first % size_) {}
    int64_t next() {
        const int64_t block = block_;
        at_ += rest_;
        block_ += blocks_ + (at_ >= size_);
        at_ -= at_ >= size_ ? size_ : 0;
        return block;
    }

  private:
    int64_t size_, blocks_, rest_;  // of a step: whole blocks and elements beyond them
    int64_t block_, at_;            // at_: element within the block
};

}  // namespace
}  // namespace lora_ops
