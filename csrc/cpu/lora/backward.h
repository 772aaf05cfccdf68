// dS, dA, dB, dbias and what is added to dX.
//
// Rows are taken kSuperRows at a time. Of those, dy is read once by blocks of columns for dS, dB and dbias; then x and dX
// once by blocks of columns for dA and dX.
#pragma once

#include "common/threads.h"
#include "lora/tiles.h"

namespace lora_ops {
namespace {

template <class V, class T>
class BackwardPass : Tiles<V> {
    using Tile = Tiles<V>;
    using Tile::kPair, Tile::kTileElements, Tile::kPairsRow, Tile::elements;
    using Scratch = typename Tile::Scratch;

    // kSuperRows rows from `begin` on, or as many as there are.
    struct Super {
        int64_t begin, rows;
        bool in_parts() const { return begin > 0; }  // a running sum over all rows would be less exact than torch's
    };

  public:
    explicit BackwardPass(const LoraBackward& call)
        : g_(call), n_(call.adapter.n), k_(call.adapter.k), r_(call.adapter.r), lanes_(round_up(r_, kLanes)),
          n_padded_(round_up(n_, kBlock)), k_padded_(round_up(k_, kBlock)), drop_(call.adapter.threshold > 0),
          adds_(call.dx && !call.ds), needs_ds_(call.dlora_a || call.dx || call.ds), ones_(kPair > 1 && call.dbias),
          levels_(kPair == 1 && call.dbias), s_rows_((call.dlora_b ? r_ : 0) + (ones_ ? 1 : 0)),
          s_lanes_(round_up(s_rows_, kLanes)),
          part_rows_(call.m > kSuperRows ? round_up(std::max(r_, s_rows_), 4) : 0),
          tiles_n_((n_ + kTileColumns - 1) / kTileColumns), groups_(std::min(kGroups, tiles_n_)) {}

    int run() {
        char* const memory = thread_memory(Use::kLora, place(nullptr));
        if (!memory) return LORA_OPS_NO_MEMORY;
        place(memory);
#pragma omp parallel num_threads(g_.n_threads)
        {
            Scratch my;
            my.place(scratches_ + scratch_bytes_ * thread_number(), std::max(lanes_, s_lanes_), part_rows_);
            typename V::Mask mask(mask_key(g_.adapter));
            pack_factors();
            for (int64_t begin = 0; begin < g_.m; begin += kSuperRows) {
                const Super super = {begin, std::min(kSuperRows, g_.m - begin)};
                pack_s(my, super);
#pragma omp barrier
#pragma omp for schedule(static)
                for (int64_t group = 0; group < groups_; ++group) read_dy(my, super, group);
                if (!needs_ds_) continue;
                total_ds(my, super);
#pragma omp for schedule(static) nowait
                for (int64_t c = 0; c < k_; c += kTileColumns) read_x(my, mask, super, c);
            }
#pragma omp barrier
            write_dlora_a();
            write_dlora_b_and_dbias();
        }
        return LORA_OPS_OK;
    }

  private:
    int64_t place(void* memory) {
        Scratch sizes;
        scratch_bytes_ = sizes.place(nullptr, std::max(lanes_, s_lanes_), part_rows_);
        Arena arena(memory);
        lora_a_ = arena.take<uint32_t>(adds_ ? elements(r_) * k_padded_ : 0);
        lora_b_ = arena.take<uint32_t>(needs_ds_ ? elements(n_) * lanes_ : 0);
        s_ = arena.take<uint32_t>(kSuperRows / kPair * s_lanes_);
        ds_ = arena.take<uint32_t>(kSuperRows * lanes_ / kPair);
        ds_pairs_ = arena.take<uint32_t>(kSuperRows / kPair * lanes_);
        ds_parts_ = arena.take<float>(needs_ds_ ? groups_ * kSuperRows * lanes_ : 0);
        dlora_a_ = arena.take<float>(g_.dlora_a ? round_up(r_, 4) * k_padded_ : 0);
        dlora_b_ = arena.take<float>(round_up(s_rows_, 4) * n_padded_);
        dbias_ = arena.take<float>(levels_ ? 3 * n_padded_ : 0);
        scratches_ = arena.take<char>(scratch_bytes_ * g_.n_threads);
        return arena.used();
    }

    void pack_factors() {
        const lora_ops_adapter& adapter = g_.adapter;
#pragma omp for schedule(static) nowait
        for (int64_t p = 0; p < (adds_ ? elements(r_) : 0); ++p) {
            with_elements(adapter.lora_a, adapter.lora_a_dtype,
                          [&](auto* a) { Tile::pack_summed_rows(a, r_, k_, p, p + 1, lora_a_, k_padded_); });
        }
#pragma omp for schedule(static) nowait
        for (int64_t p = 0; p < (needs_ds_ ? elements(n_) : 0); ++p) {
            with_elements(adapter.lora_b, adapter.lora_b_dtype,
                          [&](auto* b) { Tile::pack_summed_rows(b, n_, r_, p, p + 1, lora_b_, lanes_); });
        }
    }

    void pack_s(Scratch& my, const Super& super) {
#pragma omp for schedule(static) nowait
        for (int64_t m = 0; m < (s_rows_ > 0 ? super.rows : 0); m += kTileRows) {
            const int64_t rows = std::min(kTileRows, super.rows - m);
            for (int64_t i = 0; i < rows; ++i) {
                float* const row = my.sums + i * s_lanes_;
                for (int64_t j = 0; g_.dlora_b && j < r_; ++j) {
                    row[j] = g_.s[(super.begin + m + i) * r_ + j] * g_.adapter.scale;
                }
                if (ones_) row[s_rows_ - 1] = 1.0f;
            }
            for (int64_t i = 0; i < rows; i += kPair) {
                Tile::pack_together(my.sums + i * s_lanes_, s_lanes_, rows - i, s_rows_, nullptr,
                                    s_ + (m + i) / kPair * s_lanes_, s_lanes_);
            }
        }
    }

    // A group of dy's blocks of columns: its part of dS, and its columns of dB and dbias.
    void read_dy(Scratch& my, const Super& super, int64_t group) {
        float* const ds = ds_parts_ + group * kSuperRows * lanes_;
        const int64_t first = tiles_n_ * group / groups_, last = tiles_n_ * (group + 1) / groups_;
        for (int64_t t = first; t < last; ++t) {
            const int64_t c = t * kTileColumns, columns = std::min(kTileColumns, n_ - c);
            for (int64_t m = 0; m < super.rows; m += kTileRows) {
                const int64_t rows = std::min(kTileRows, super.rows - m), padded_rows = round_up(rows, 16);
                const T* const dy = static_cast<const T*>(g_.dy) + (super.begin + m) * g_.stride_dy + c;
                for (int64_t i = kTileRows; i < std::min(2 * kTileRows, super.rows - m); ++i) {
                    prefetch(dy + i * g_.stride_dy, columns);
                }
                if (needs_ds_ || kPair == 1) {
                    for (int64_t i = 0; i < padded_rows; ++i) {
                        V::pack_row(dy + i * g_.stride_dy, i < rows ? columns : 0, nullptr,
                                    my.tile + i * kTileElements, kTileColumns);
                    }
                }
                if (needs_ds_) {
                    // [rows, N] @ [N, R] -> [rows, R]
                    product<V>(padded_rows, lanes_, elements(columns), my.tile, Fixed<kTileElements>(), Fixed<1>(),
                               lora_b_ + c / kPair * lanes_, lanes_, ds + m * lanes_, lanes_, t > first,
                               terms_at_once(n_));
                }
                if (levels_) {
                    sum_rows<V>(my.tile, kTileElements, padded_rows, round_up(columns, 16), dbias_ + c, m > 0);
                }
                if (s_rows_ > 0) add_to_dlora_b(my, super, m, rows, c, columns, dy);
            }
            if (super.in_parts()) add_rows(my.parts, kTileColumns, s_rows_, columns, dlora_b_ + c, n_padded_);
            if (levels_) raise_dbias(super, c, columns);
        }
    }

    // [R, rows] @ [rows, N] -> [R, N]
    void add_to_dlora_b(Scratch& my, const Super& super, int64_t m, int64_t rows, int64_t c, int64_t columns,
                        const T* dy) {
        for (int64_t i = 0; i < rows && kPair > 1; i += kPair) {
            Tile::pack_together(dy + i * g_.stride_dy, g_.stride_dy, rows - i, columns, nullptr,
                                my.pairs + i / kPair * kPairsRow, kTileColumns);
        }
        float* const to = super.in_parts() ? my.parts : dlora_b_ + c;
        product<V>(round_up(s_rows_, 4), round_up(columns, kBlock), elements(rows), s_ + m / kPair * s_lanes_,
                   Fixed<1>(), s_lanes_, my.pairs, kPairsRow, to, super.in_parts() ? kTileColumns : n_padded_, m > 0);
    }

    // The sums of kSuperRows to those of kSupers times as many, and these to those of all.
    void raise_dbias(const Super& super, int64_t c, int64_t columns) {
        const int64_t number = super.begin / kSuperRows % kSupers;
        float *const some = dbias_ + n_padded_ + c, *const all = some + n_padded_;
        add_rows(dbias_ + c, n_padded_, 1, columns, some, n_padded_, number > 0);
        if (number == kSupers - 1 || super.begin + super.rows == g_.m) {
            add_rows(some, n_padded_, 1, columns, all, n_padded_, super.begin >= kSupers * kSuperRows);
        }
    }

    // dS, to where the products with A and x read it.
    void total_ds(Scratch& my, const Super& super) {
        const float factor = g_.adapter.scale * keep_scale(g_.adapter);
        const int64_t width = g_.ds ? padded_rank(r_) : lanes_;
        uint32_t* const ds = g_.ds ? static_cast<uint32_t*>(g_.ds) + super.begin * width / kPair : ds_;
#pragma omp for schedule(static)
        for (int64_t m = 0; m < super.rows; m += kTileRows) {
            const int64_t rows = std::min(kTileRows, super.rows - m), padded_rows = round_up(rows, 16);
            for (int64_t i = 0; i < rows * lanes_; ++i) {
                float sum = 0.0f;
                for (int64_t group = 0; group < groups_; ++group) {
                    sum += ds_parts_[(group * kSuperRows + m) * lanes_ + i];
                }
                my.sums[i] = sum * factor;
            }
            for (int64_t i = 0; i < (g_.ds ? rows : padded_rows); ++i) {
                V::pack_row(my.sums + i * lanes_, i < rows ? r_ : 0, nullptr, ds + (m + i) * width / kPair, width);
            }
            for (int64_t i = 0; i < rows; i += kPair) {
                Tile::pack_together(my.sums + i * lanes_, lanes_, rows - i, r_, nullptr,
                                    ds_pairs_ + (m + i) / kPair * lanes_, lanes_);
            }
        }
    }

    // A block of columns of x and dX.
    void read_x(Scratch& my, typename V::Mask& mask, const Super& super, int64_t c) {
        const int64_t columns = std::min(kTileColumns, k_ - c);
        if (drop_) mask.start(c);
        for (int64_t m = 0; m < super.rows; m += kTileRows) {
            const int64_t rows = std::min(kTileRows, super.rows - m), row = super.begin + m;
            const T* const x = g_.dlora_a ? static_cast<const T*>(g_.x) + row * g_.stride_x + c : nullptr;
            for (int64_t i = kTileRows; g_.dlora_a && i < std::min(2 * kTileRows, super.rows - m); ++i) {
                prefetch(x + i * g_.stride_x, columns);
            }
            if (drop_) draw_mask(my, mask, row, rows, c);
            if (g_.dlora_a) {
                for (int64_t i = 0; i < rows; i += kPair) {
                    Tile::pack_together(x + i * g_.stride_x, g_.stride_x, rows - i, columns,
                                        drop_ ? my.bits + i * kMaskBytes : nullptr,
                                        my.pairs + i / kPair * kPairsRow, kTileColumns);
                }
                // [R, rows] @ [rows, K] -> [R, K]
                float* const to = super.in_parts() ? my.parts : dlora_a_ + c;
                product<V>(round_up(r_, 4), round_up(columns, kBlock), elements(rows), ds_pairs_ + m / kPair * lanes_,
                           Fixed<1>(), lanes_, my.pairs, kPairsRow, to, super.in_parts() ? kTileColumns : k_padded_,
                           m > 0);
            }
            if (adds_) {
                // [rows, R] @ [R, K] -> [rows, K]
                Tile::add_product(static_cast<T*>(g_.dx) + row * g_.stride_dx, g_.stride_dx, rows, c, c + columns,
                                  elements(r_), ds_ + m * lanes_ / kPair, lanes_ / kPair, lora_a_, k_padded_,
                                  drop_ ? my.bits : nullptr);
            }
        }
        if (super.in_parts() && g_.dlora_a) add_rows(my.parts, kTileColumns, r_, columns, dlora_a_ + c, k_padded_);
    }

    void draw_mask(Scratch& my, typename V::Mask& mask, int64_t row, int64_t rows, int64_t c) {
        for (int64_t i = 0; i < rows; ++i) {
            mask.row(row + i, my.bits + i * kMaskBytes);
            if (!g_.mask) continue;
            memcpy(g_.mask + (row + i) * g_.stride_mask + c / 8, my.bits + i * kMaskBytes,
                   static_cast<size_t>(std::min<int64_t>(kMaskBytes, g_.stride_mask - c / 8)));
        }
    }

    void write_dlora_a() {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < (g_.dlora_a ? r_ : 0); ++i) {
            with_dtype(g_.adapter.lora_a_dtype, [&](auto type) {
                using A = decltype(type);
                A* const to = static_cast<A*>(g_.dlora_a) + i * k_;
                for (int64_t c = 0; c < k_; ++c) to[c] = round_to<A>(dlora_a_[i * k_padded_ + c]);
            });
        }
    }

    void write_dlora_b_and_dbias() {
        const float* const dbias = levels_ ? dbias_ + 2 * n_padded_
                                   : ones_ ? dlora_b_ + (s_rows_ - 1) * n_padded_
                                           : nullptr;
#pragma omp for schedule(static)
        for (int64_t first = 0; first < (g_.dlora_b || g_.dbias ? n_ : 0); first += kBlock) {
            const int64_t end = std::min(n_, first + kBlock);
            with_dtype(g_.adapter.lora_b_dtype, [&](auto type) {
                using B = decltype(type);
                for (int64_t i = 0; g_.dlora_b && i < r_; ++i) {
                    B* const to = static_cast<B*>(g_.dlora_b) + i;
                    for (int64_t c = first; c < end; ++c) to[c * r_] = round_to<B>(dlora_b_[i * n_padded_ + c]);
                }
            });
            for (int64_t c = first; g_.dbias && c < end; ++c) static_cast<T*>(g_.dbias)[c] = round_to<T>(dbias[c]);
        }
    }

    const LoraBackward& g_;
    const int64_t n_, k_, r_, lanes_, n_padded_, k_padded_;
    const bool drop_, adds_, needs_ds_;
    // Pairs of bfloat16: a last row of ones beside S turns the product that gives dB into one that gives dbias, too. Its
    // long sums are as exact as bfloat16 asks for; those of float32 are taken in levels.
    const bool ones_, levels_;
    const int64_t s_rows_, s_lanes_, part_rows_, tiles_n_, groups_;

    uint32_t *lora_a_, *lora_b_;  // [R, k_padded], pairs along R, and [N, lanes], pairs along N
    uint32_t* s_;                 // [kSuperRows, s_lanes], pairs along rows
    uint32_t *ds_, *ds_pairs_;    // [kSuperRows, lanes], pairs along R and along rows
    float* ds_parts_;             // [groups, kSuperRows, lanes]
    float *dlora_a_, *dlora_b_;   // [R, k_padded], [s_rows, n_padded]
    float* dbias_;                // [3, n_padded], over kSuperRows, kSupers of them, and all
    char* scratches_;
    int64_t scratch_bytes_;
};

}  // namespace
}  // namespace lora_ops
