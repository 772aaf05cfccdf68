// Included by lora.inl: S and what it adds to y.
#pragma once

namespace lora_ops {
namespace {

// The forward of a few rows, as in generation, where packing all of A and B would cost more than using them: S by dot
// products with A as it stands, split by rank; then, for single floats, B a block of rows at a time.
template <class V>
template <class T>
int Lora<V>::forward_few(const LoraForward& f) {
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
        few.x = arena.take<uint32_t>(f.m * k_padded / kPair);
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
    T* const rounded = static_cast<T*>(f.left);
    if (rounded) memset(rounded, 0, static_cast<size_t>(f.m * left_stride(r)) * sizeof *rounded);

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
                            my.x + (i * k_padded + c) / kPair, kTileColumns);
            }
        }
#pragma omp for schedule(static)
        for (int64_t j = 0; j < r; ++j) {
            typename V::F sums[kFewRowsOfS];
            for (int64_t i = 0; i < f.m; ++i) sums[i] = V::zero();
            with_type(adapter.a, adapter.a_dtype, [&](auto* a) {
                using AsItIs = std::conditional_t<kPair == 2, const BF16*, const float*>;
                constexpr bool kAsItIs = std::is_same_v<decltype(a), AsItIs>;
                for (int64_t c = 0; c < k; c += kTileColumns) {
                    const int64_t columns = std::min(kTileColumns, k - c), width = round_up(columns, 64 * kPair);
                    const auto* row = reinterpret_cast<const uint32_t*>(a + j * k + c);
                    if (!kAsItIs || width != columns) {
                        V::pack_row(a + j * k + c, columns, nullptr, my.tile, width);
                        row = my.tile;
                    }
                    for (int64_t i = 0; i < f.m; ++i) {
                        sums[i] = sums[i] + dot<V>(row, my.x + (i * k_padded + c) / kPair, width / kPair);
                    }
                }
            });
            for (int64_t i = 0; i < f.m; ++i) {
                const float s = sum_of_lanes<V>(sums[i]) * keep;
                f.s[i * r + j] = s;
                left[i * lanes + j] = float_bits(s * adapter.scale);
                if (rounded) rounded[i * left_stride(r) + j] = round_to<T>(s * adapter.scale);
            }
        }
        if constexpr (kPair == 1) {
#pragma omp for schedule(static)
            for (int64_t first = 0; first < (rounded ? 0 : n); first += kBlock) {
                with_type(adapter.b, adapter.b_dtype, [&](auto* b) {
                    for (int64_t c = 0; c < r; c += kTileColumns) {
                        pack_summed_columns(b, n, r, first, kBlock, c, my.right + c * kBlock, kBlock, my.tile);
                    }
                });
                add_product(y + first, f.y_stride, f.m, 0, std::min(kBlock, n - first), r, left, lanes, my.right, kBlock,
                            static_cast<const uint8_t*>(nullptr));
            }
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
        b_panel = arena.take<uint32_t>(f.left ? 0 : elements(r) * n_padded);
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
        for (int64_t i = 0; i < (f.left ? 0 : n_padded); i += kTileRows) {
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
                product<V>(padded_rows, lanes, elements(columns), my.tile, Fixed<kTileElements>(), Fixed<1>(),
                           a_panel + c / kPair * lanes, lanes, my.sums, lanes, c > 0, terms_at_once(k));
            }
            for (int64_t i = 0; i < rows; ++i) {
                for (int64_t j = 0; j < r; ++j) {
                    const float s = my.sums[i * lanes + j] * keep;
                    f.s[(m + i) * r + j] = s;
                    my.sums[i * lanes + j] = s * adapter.scale;
                }
            }
            if (f.left) {
                const int64_t stride = left_stride(r);
                uint32_t* const left = static_cast<uint32_t*>(f.left) + m * stride / kPair;
                for (int64_t i = 0; i < rows; ++i) {
                    V::pack_row(my.sums + i * lanes, r, nullptr, left + i * stride / kPair, stride);
                }
                continue;
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

}  // namespace
}  // namespace lora_ops
