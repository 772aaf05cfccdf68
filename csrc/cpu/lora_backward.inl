// Included by lora.inl: dS, dA, dB, db and what is added to dX.
#pragma once

namespace lora_ops {
namespace {

template <class V>
template <class T>
int Lora<V>::backward(const LoraBackward& g) {
    const lora_ops_adapter& adapter = g.adapter;
    const int64_t n = adapter.n, k = adapter.k, r = adapter.r, m_all = g.m, lanes = round_up(r, kLanes);
    const int64_t n_padded = round_up(n, kBlock), k_padded = round_up(k, kBlock);
    const bool drop = adapter.threshold > 0, adds = g.dx && !g.left;
    const bool needs_ds = g.da || g.dx || g.left, needs_sums = g.db || g.dbias;
    // Pairs of bfloat16: a last row of ones beside S turns the product that gives dB into one that gives dbias, too. Its
    // long sums are as exact as bfloat16 asks for; those of float32 are taken in levels.
    const bool ones = kPair > 1 && g.dbias, levels = kPair == 1 && g.dbias;
    const int64_t b_rows = (g.db ? r : 0) + (ones ? 1 : 0), b_lanes = round_up(b_rows, kLanes);
    const int64_t part_rows = m_all > kSuperRows ? round_up(std::max(r, b_rows), 4) : 0;
    const int64_t tiles_n = (n + kTileColumns - 1) / kTileColumns, groups = std::min(kGroups, tiles_n);
    const T *const dy = static_cast<const T*>(g.dy), *const x = static_cast<const T*>(g.x);
    T* const dx = static_cast<T*>(g.dx);

    Scratch sizes;
    const size_t scratch_bytes = sizes.place(nullptr, std::max(lanes, b_lanes), part_rows);
    uint32_t *a_panel, *b_panel, *s_left, *ds_left, *ds_pairs;
    float *ds_parts, *da_sums, *db_sums, *bias_sums;
    char* scratches;
    const auto place = [&](void* memory) {
        Arena arena(memory);
        a_panel = arena.take<uint32_t>(adds ? elements(r) * k_padded : 0);       // [R, K]
        b_panel = arena.take<uint32_t>(needs_ds ? elements(n) * lanes : 0);      // [N, R]
        s_left = arena.take<uint32_t>(kSuperRows / kPair * b_lanes);             // [rows, R]
        ds_left = arena.take<uint32_t>(kSuperRows * lanes / kPair);              // [rows, R], pairs along R
        ds_pairs = arena.take<uint32_t>(kSuperRows / kPair * lanes);             // [rows, R], pairs along rows
        ds_parts = arena.take<float>(needs_ds ? groups * kSuperRows * lanes : 0);
        da_sums = arena.take<float>(g.da ? round_up(r, 4) * k_padded : 0);       // [R, K]
        db_sums = arena.take<float>(round_up(b_rows, 4) * n_padded);             // [R, N]
        bias_sums = arena.take<float>(levels ? 3 * n_padded : 0);  // [3, N], over kSuperRows, kSupers of them, and all
        scratches = arena.take<char>(static_cast<int64_t>(scratch_bytes) * g.n_threads);
        return arena.used();
    };
    void* const memory = lora_workspace(place(nullptr));
    if (!memory) return LORA_OPS_NO_MEMORY;
    place(memory);

#pragma omp parallel num_threads(g.n_threads)
    {
        Scratch my;
        my.place(scratches + scratch_bytes * static_cast<size_t>(thread_number()), std::max(lanes, b_lanes), part_rows);
        typename V::Mask mask(mask_key(adapter));
        if (adds) {
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
            const bool in_parts = m0 > 0;  // a running sum over all rows would be less exact than torch's
            if (b_rows > 0) {
#pragma omp for schedule(static) nowait
                for (int64_t m = 0; m < rows_all; m += kTileRows) {
                    const int64_t rows = std::min(kTileRows, rows_all - m);
                    for (int64_t i = 0; i < rows; ++i) {
                        float* const row = my.sums + i * b_lanes;
                        for (int64_t j = 0; g.db && j < r; ++j) row[j] = g.s[(m0 + m + i) * r + j] * adapter.scale;
                        if (ones) row[b_rows - 1] = 1.0f;
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
                    float* const db_to = in_parts ? my.parts : db_sums + c;
                    const int64_t db_row = in_parts ? kTileColumns : n_padded;
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
                            product<V>(padded_rows, lanes, elements(columns), my.tile, Fixed<kTileElements>(),
                                       Fixed<1>(), b_panel + c / kPair * lanes, lanes, ds + m * lanes, lanes,
                                       t > first, terms_at_once(n));
                        }
                        if (levels) {
                            sum_rows<V>(my.tile, kTileElements, padded_rows, round_up(columns, 16), bias_sums + c,
                                        m > 0);
                        }
                        if (b_rows > 0) {
                            for (int64_t i = 0; i < rows && kPair > 1; i += kPair) {
                                pack_together(from + i * g.dy_stride, g.dy_stride, rows - i, columns, nullptr,
                                              my.pairs + i / kPair * kPairsRow, kTileColumns);
                            }
                            // [R, rows] @ [rows, N] -> [R, N]
                            product<V>(round_up(b_rows, 4), round_up(columns, kBlock), elements(rows),
                                       s_left + m / kPair * b_lanes, Fixed<1>(), b_lanes, my.pairs, kPairsRow,
                                       db_to, db_row, m > 0);
                        }
                    }
                    if (in_parts) add_rows(my.parts, kTileColumns, b_rows, columns, db_sums + c, n_padded);
                    if (levels) {
                        const int64_t super = m0 / kSuperRows % kSupers;
                        float *const some = bias_sums + n_padded + c, *const all = some + n_padded;
                        add_rows(bias_sums + c, n_padded, 1, columns, some, n_padded, super > 0);
                        if (super == kSupers - 1 || m0 + rows_all == m_all) {
                            add_rows(some, n_padded, 1, columns, all, n_padded, m0 >= kSupers * kSuperRows);
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
                const int64_t stride = g.left ? left_stride(r) : lanes;
                uint32_t* const left = (g.left ? static_cast<uint32_t*>(g.left) + m0 * stride / kPair : ds_left);
                for (int64_t i = 0; i < (g.left ? rows : padded_rows); ++i) {
                    V::pack_row(my.sums + i * lanes, i < rows ? r : 0, nullptr, left + (m + i) * stride / kPair,
                                stride);
                }
                for (int64_t i = 0; i < rows; i += kPair) {
                    pack_together(my.sums + i * lanes, lanes, rows - i, r, nullptr, ds_pairs + (m + i) / kPair * lanes,
                                  lanes);
                }
            }
#pragma omp for schedule(static) nowait
            for (int64_t c = 0; c < k; c += kTileColumns) {
                const int64_t columns = std::min(kTileColumns, k - c);
                float* const da_to = in_parts ? my.parts : da_sums + c;
                const int64_t da_row = in_parts ? kTileColumns : k_padded;
                if (drop) mask.start(c);
                for (int64_t m = 0; m < rows_all; m += kTileRows) {
                    const int64_t rows = std::min(kTileRows, rows_all - m);
                    for (int64_t i = kTileRows; i < std::min(2 * kTileRows, rows_all - m); ++i) {
                        if (g.da) prefetch(x + (m0 + m + i) * g.x_stride + c, columns);
                    }
                    for (int64_t i = 0; drop && i < rows; ++i) {
                        mask.row(m0 + m + i, my.bits + i * kMaskBytes);
                        if (!g.bits) continue;
                        memcpy(g.bits + (m0 + m + i) * g.bits_stride + c / 8, my.bits + i * kMaskBytes,
                               std::min<int64_t>(kMaskBytes, g.bits_stride - c / 8));
                    }
                    if (g.da) {
                        for (int64_t i = 0; i < rows; i += kPair) {
                            pack_together(x + (m0 + m + i) * g.x_stride + c, g.x_stride, rows - i, columns,
                                          drop ? my.bits + i * kMaskBytes : nullptr,
                                          my.pairs + i / kPair * kPairsRow, kTileColumns);
                        }
                        // [R, rows] @ [rows, K] -> [R, K]
                        product<V>(round_up(r, 4), round_up(columns, kBlock), elements(rows),
                                   ds_pairs + m / kPair * lanes, Fixed<1>(), lanes, my.pairs, kPairsRow, da_to,
                                   da_row, m > 0);
                    }
                    if (adds) {
                        // [rows, R] @ [R, K] -> [rows, K]
                        add_product(dx + (m0 + m) * g.dx_stride, g.dx_stride, rows, c, c + columns, elements(r),
                                    ds_left + m * lanes / kPair, lanes / kPair, a_panel, k_padded,
                                    drop ? my.bits : nullptr);
                    }
                }
                if (in_parts && g.da) add_rows(my.parts, kTileColumns, r, columns, da_sums + c, k_padded);
            }
        }
#pragma omp barrier
        if (g.da) {
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < r; ++i) {
                with_type(g.da, adapter.a_dtype, [&](auto* da) {
                    using A = std::remove_const_t<std::remove_pointer_t<decltype(da)>>;
                    for (int64_t c = 0; c < k; ++c) {
                        const_cast<A*>(da)[i * k + c] = round_to<A>(da_sums[i * k_padded + c]);
                    }
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
                    const float* const sums = levels ? bias_sums + 2 * n_padded : db_sums + (b_rows - 1) * n_padded;
                    static_cast<T*>(g.dbias)[c] = round_to<T>(sums[c]);
                }
            }
        }
    }
    return LORA_OPS_OK;
}

}  // namespace
}  // namespace lora_ops
