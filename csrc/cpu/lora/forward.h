// S and what it adds to y, for many rows: tiles of rows, each of one thread.
#pragma once

#include "common/threads.h"
#include "lora/tiles.h"

namespace lora_ops {
namespace {

template <class V, class T>
class ForwardPass : Tiles<V> {
    using Tile = Tiles<V>;
    using Tile::kPair, Tile::kTileElements, Tile::elements;
    using Scratch = typename Tile::Scratch;

  public:
    explicit ForwardPass(const LoraForward& call)
        : f_(call), n_(call.adapter.n), k_(call.adapter.k), r_(call.adapter.r), lanes_(round_up(r_, kLanes)),
          n_padded_(round_up(n_, kBlock)),
          // Smaller tiles where whole ones would leave threads without work.
          tile_rows_(call.m >= kTileRows * call.n_threads ? kTileRows : kTileRows / 2) {}

    int run() {
        char* const memory = thread_memory(Use::kLora, place(nullptr));
        if (!memory) return LORA_OPS_NO_MEMORY;
        place(memory);
#pragma omp parallel num_threads(f_.n_threads)
        {
            Scratch my;
            my.place(scratches_ + scratch_bytes_ * thread_number(), lanes_);
            typename V::Mask mask(mask_key(f_.adapter));
            pack_lora_a(my);
            pack_lora_b(my);
#pragma omp for schedule(static)
            for (int64_t m = 0; m < f_.m; m += tile_rows_) {
                const int64_t rows = std::min(tile_rows_, f_.m - m);
                sum_s(my, mask, m, rows);
                write_s(my, m, rows);
                if (!f_.scaled_s) add_to_y(my, m, rows);
            }
        }
        return LORA_OPS_OK;
    }

  private:
    int64_t place(void* memory) {
        Scratch sizes;
        scratch_bytes_ = sizes.place(nullptr, lanes_);
        Arena arena(memory);
        lora_a_ = arena.take<uint32_t>(elements(k_) * lanes_);
        lora_b_ = arena.take<uint32_t>(f_.scaled_s ? 0 : elements(r_) * n_padded_);
        scratches_ = arena.take<char>(scratch_bytes_ * f_.n_threads);
        return arena.used();
    }

    void pack_lora_a(Scratch& my) {
#pragma omp for schedule(static) nowait
        for (int64_t c = 0; c < k_; c += kTileColumns) {
            with_elements(f_.adapter.lora_a, f_.adapter.lora_a_dtype, [&](auto* lora_a) {
                for (int64_t i = 0; i < lanes_; i += kTileRows) {
                    Tile::pack_summed_columns(lora_a, r_, k_, i, std::min(kTileRows, lanes_ - i), c,
                                              lora_a_ + c / kPair * lanes_ + i, lanes_, my.tile);
                }
            });
        }
    }

    void pack_lora_b(Scratch& my) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < (f_.scaled_s ? 0 : n_padded_); i += kTileRows) {
            with_elements(f_.adapter.lora_b, f_.adapter.lora_b_dtype, [&](auto* lora_b) {
                for (int64_t c = 0; c < r_; c += kTileColumns) {
                    Tile::pack_summed_columns(lora_b, n_, r_, i, kTileRows, c, lora_b_ + c / kPair * n_padded_ + i,
                                              n_padded_, my.tile);
                }
            });
        }
    }

    // [rows, K] @ [K, R] -> [rows, R]
    void sum_s(Scratch& my, typename V::Mask& mask, int64_t m, int64_t rows) {
        const int64_t padded_rows = round_up(rows, 16);
        const bool drop = f_.adapter.threshold > 0;
        for (int64_t c = 0; c < k_; c += kTileColumns) {
            const int64_t columns = std::min(kTileColumns, k_ - c);
            if (drop) mask.start(c);
            for (int64_t i = 0; i < padded_rows; ++i) {
                if (drop) mask.row(m + i, my.bits);
                const T* const from = static_cast<const T*>(f_.x) + (m + i) * f_.stride_x + c;
                if (i < rows) prefetch(from + columns, std::min(kTileColumns, k_ - c - columns));
                V::pack_row(from, i < rows ? columns : 0, drop ? my.bits : nullptr, my.tile + i * kTileElements,
                            kTileColumns);
            }
            product<V>(padded_rows, lanes_, elements(columns), my.tile, Fixed<kTileElements>(), Fixed<1>(),
                       lora_a_ + c / kPair * lanes_, lanes_, my.sums, lanes_, c > 0, terms_at_once(k_));
        }
    }

    // S, and scale S to where the next product reads it.
    void write_s(Scratch& my, int64_t m, int64_t rows) {
        const float keep = keep_scale(f_.adapter), scale = f_.adapter.scale;
        for (int64_t i = 0; i < rows; ++i) {
            for (int64_t j = 0; j < r_; ++j) {
                const float s = my.sums[i * lanes_ + j] * keep;
                f_.s[(m + i) * r_ + j] = s;
                my.sums[i * lanes_ + j] = s * scale;
            }
        }
        const int64_t width = f_.scaled_s ? padded_rank(r_) : lanes_;
        uint32_t* const to = f_.scaled_s ? static_cast<uint32_t*>(f_.scaled_s) + m * width / kPair : my.s;
        for (int64_t i = 0; i < (f_.scaled_s ? rows : round_up(rows, 16)); ++i) {
            V::pack_row(my.sums + i * lanes_, r_, nullptr, to + i * width / kPair, width);
        }
    }

    // [rows, R] @ [R, N] -> [rows, N]
    void add_to_y(Scratch& my, int64_t m, int64_t rows) {
        for (int64_t c = 0; c < n_; c += kTileColumns) {
            Tile::add_product(static_cast<T*>(f_.y) + m * f_.stride_y, f_.stride_y, rows, c,
                              std::min(n_, c + kTileColumns), elements(r_), my.s, lanes_ / kPair, lora_b_, n_padded_,
                              static_cast<const uint8_t*>(nullptr));
        }
    }

    const LoraForward& f_;
    const int64_t n_, k_, r_, lanes_, n_padded_, tile_rows_;
    uint32_t *lora_a_, *lora_b_;  // Aᵀ [K, lanes] and Bᵀ [R, n_padded], pairs along K and R
    char* scratches_;
    int64_t scratch_bytes_;
};

}  // namespace
}  // namespace lora_ops
