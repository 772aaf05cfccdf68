// S and what it adds to y, for a few rows, as in generation, where packing all of A and B would cost more than using
// them: S by dot products with A as it stands, split by rank; then, for single floats, B a block of rows at a time.
#pragma once

#include <type_traits>

#include "common/threads.h"
#include "lora/tiles.h"

namespace lora_ops {
namespace {

template <class V, class T>
class FewRowsPass : Tiles<V> {
    using Tile = Tiles<V>;
    using Tile::kPair, Tile::kTileElements;

    // What each thread has to itself.
    struct Scratch {
        uint32_t *x, *tile, *lora_b;  // x [m, k_padded], a tile, and a block of rows of B, [R, kBlock]
    };

  public:
    explicit FewRowsPass(const LoraForward& call)
        : f_(call), n_(call.adapter.n), k_(call.adapter.k), r_(call.adapter.r), lanes_(round_up(r_, kLanes)),
          k_padded_(round_up(k_, kTileColumns)) {}

    int run() {
        char* const memory = thread_memory(Use::kLora, place(nullptr));
        if (!memory) return LORA_OPS_NO_MEMORY;
        place(memory);
        memset(s_, 0, static_cast<size_t>(round_up(f_.m, 4) * lanes_) * sizeof *s_);
        T* const scaled_s = static_cast<T*>(f_.scaled_s);
        if (scaled_s) memset(scaled_s, 0, static_cast<size_t>(f_.m * padded_rank(r_)) * sizeof *scaled_s);
#pragma omp parallel num_threads(f_.n_threads)
        {
            Scratch my;
            place(scratches_ + scratch_bytes_ * thread_number(), my);
            pack_x(my);
#pragma omp for schedule(static)
            for (int64_t j = 0; j < r_; ++j) sum_s(my, j);
            if constexpr (kPair == 1) {
#pragma omp for schedule(static)
                for (int64_t first = 0; first < (scaled_s ? 0 : n_); first += kBlock) add_to_y(my, first);
            }
        }
        return LORA_OPS_OK;
    }

  private:
    int64_t place(void* memory, Scratch& my) {
        Arena arena(memory);
        my.x = arena.take<uint32_t>(f_.m * k_padded_ / kPair);
        my.tile = arena.take<uint32_t>(kBlock * kTileElements);
        my.lora_b = arena.take<uint32_t>(r_ * kBlock);
        return arena.used();
    }

    int64_t place(void* memory) {
        Scratch sizes;
        scratch_bytes_ = place(nullptr, sizes);
        Arena arena(memory);
        s_ = arena.take<uint32_t>(round_up(f_.m, 4) * lanes_);
        scratches_ = arena.take<char>(scratch_bytes_ * f_.n_threads);
        return arena.used();
    }

    void pack_x(Scratch& my) {
        const bool drop = f_.adapter.threshold > 0;
        typename V::Mask mask(mask_key(f_.adapter));
        for (int64_t c = 0; c < k_; c += kTileColumns) {
            if (drop) mask.start(c);
            for (int64_t i = 0; i < f_.m; ++i) {
                uint8_t bits[kMaskBytes];
                if (drop) mask.row(i, bits);
                V::pack_row(static_cast<const T*>(f_.x) + i * f_.stride_x + c, std::min(kTileColumns, k_ - c),
                            drop ? bits : nullptr, my.x + (i * k_padded_ + c) / kPair, kTileColumns);
            }
        }
    }

    // Column j of S: [m, K] @ [K] -> [m]
    void sum_s(Scratch& my, int64_t j) {
        typename V::F sums[kFewRowsOfS];
        for (int64_t i = 0; i < f_.m; ++i) sums[i] = V::zero();
        with_elements(f_.adapter.lora_a, f_.adapter.lora_a_dtype, [&](auto* lora_a) {
            using AsItIs = std::conditional_t<kPair == 2, const BF16*, const float*>;
            constexpr bool kAsItIs = std::is_same_v<decltype(lora_a), AsItIs>;
            for (int64_t c = 0; c < k_; c += kTileColumns) {
                const int64_t columns = std::min(kTileColumns, k_ - c), width = round_up(columns, 64 * kPair);
                const auto* row = reinterpret_cast<const uint32_t*>(lora_a + j * k_ + c);
                if (!kAsItIs || width != columns) {
                    V::pack_row(lora_a + j * k_ + c, columns, nullptr, my.tile, width);
                    row = my.tile;
                }
                for (int64_t i = 0; i < f_.m; ++i) {
                    sums[i] = sums[i] + dot<V>(row, my.x + (i * k_padded_ + c) / kPair, width / kPair);
                }
            }
        });
        const float keep = keep_scale(f_.adapter);
        for (int64_t i = 0; i < f_.m; ++i) {
            const float s = sum_of_lanes<V>(sums[i]) * keep, scaled = s * f_.adapter.scale;
            f_.s[i * r_ + j] = s;
            s_[i * lanes_ + j] = float_bits(scaled);
            if (f_.scaled_s) static_cast<T*>(f_.scaled_s)[i * padded_rank(r_) + j] = round_to<T>(scaled);
        }
    }

    // A block of columns of y: [m, R] @ [R, kBlock] -> [m, kBlock]
    void add_to_y(Scratch& my, int64_t first) {
        with_elements(f_.adapter.lora_b, f_.adapter.lora_b_dtype, [&](auto* lora_b) {
            for (int64_t c = 0; c < r_; c += kTileColumns) {
                Tile::pack_summed_columns(lora_b, n_, r_, first, kBlock, c, my.lora_b + c * kBlock, kBlock, my.tile);
            }
        });
        Tile::add_product(static_cast<T*>(f_.y) + first, f_.stride_y, f_.m, 0, std::min(kBlock, n_ - first), r_, s_,
                          lanes_, my.lora_b, kBlock, static_cast<const uint8_t*>(nullptr));
    }

    const LoraForward& f_;
    const int64_t n_, k_, r_, lanes_, k_padded_;
    uint32_t* s_;  // [m, lanes]: scale S
    char* scratches_;
    int64_t scratch_bytes_;
};

}  // namespace
}  // namespace lora_ops
