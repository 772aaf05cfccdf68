// A product with a frozen weight, blocked for the cache; written once for every instruction set.
//
// The weight is decoded, or copied, panel by panel: kColumns columns of the output and up to kDepth terms of their sums,
// laid out as the micro-kernel reads it. A panel stays in the L2 cache and is multiplied with all rows of the task. Sums stay
// in registers over a panel and, where one panel does not hold a whole sum, wait in fp32 for the next.
//
// Engine supplies, for its element type T of x, bias and y:
//   kRows, kColumns       the micro-kernel's tile: accumulators that fit the registers
//   kDepth                terms of a panel, even
//   kPanelBytes           of a panel
//   kTileBytes            scratch of a tile
//   void panel(const Gemm&, int64_t column, int64_t begin, int64_t depth, void* panel)
//                         columns [column, column + kColumns), zero beyond the last, terms [begin, begin + depth)
//   void tile<rows>(const Tile<T>&, void* scratch)    rows <= kRows
//   kFuses                whether it adds low-rank updates, with
//   void low_rank_panel(const Gemm&, int64_t column, void* panel)
#pragma once

#include <utility>

#include "common/scalar.h"
#include "gemm/gemm.h"

namespace lora_ops {
namespace {

constexpr int64_t kTaskRows = 2048;       // x's rows of a task stay in L3, and decoding again costs 0.5 %
constexpr int64_t kFewestTaskRows = 128;  // below, decoding again for another thread costs more than it gains

template <class T>
struct Tile {
    const T* x;
    int64_t stride_x;
    int64_t depth;
    const void* panel;
    float* sums;  // [rows, kColumns]
    bool first, last;
    const T* bias;
    T* y;
    int64_t stride_y;
    int64_t columns;
    // The low-rank update, added to the last sums: s [rows, r], the factor's panel, and the mask or NULL.
    const T* s;
    int64_t stride_s, r;
    const void* factor;
    const uint8_t* mask;
    int64_t stride_mask;
};

template <class Engine>
int64_t low_rank_bytes(const Gemm& g) {
    return g.low_rank ? (g.low_rank->r + 1) / 2 * 2 * Engine::kColumns * int64_t{2} : 0;
}

template <class Engine>
GemmPlan panel_plan(const Gemm& g, int n_threads) {
    const int64_t panels = ceil_div(g.columns, Engine::kColumns);
    int64_t row_blocks = ceil_div(g.m, kTaskRows);
    // Few panels: also split the rows, so that every thread has work.
    if (panels * row_blocks < 4 * n_threads) {
        const int64_t most = g.m / kFewestTaskRows > 1 ? g.m / kFewestTaskRows : 1;
        const int64_t wanted = lesser(ceil_div(4 * n_threads, panels), most);
        row_blocks = row_blocks < wanted ? wanted : row_blocks;
    }
    GemmPlan plan = {};
    plan.task_rows = ceil_div(ceil_div(g.m, row_blocks), Engine::kRows) * Engine::kRows;
    plan.tasks = panels * ceil_div(g.m, plan.task_rows);
    const bool whole_sums = g.depth <= Engine::kDepth;
    const int64_t sums = whole_sums ? 0 : plan.task_rows * Engine::kColumns * static_cast<int64_t>(sizeof(float));
    plan.scratch_bytes = Engine::kPanelBytes + Engine::kTileBytes + low_rank_bytes<Engine>(g) + sums;
    return plan;
}

template <class Engine, class T, int... i>
void run_tile(int rows, const Tile<T>& tile, void* scratch, std::integer_sequence<int, i...>) {
    ((rows == i + 1 ? Engine::template tile<i + 1>(tile, scratch) : void()), ...);
}

// Not inlined: beside the tasks of other types the compiler finds fewer registers (13 % in plain C++).
template <class Engine, class T>
__attribute__((noinline)) void panel_task(const Gemm& g, const GemmPlan& plan, int64_t task, char* scratch) {
    const int64_t panels = ceil_div(g.columns, Engine::kColumns);
    const int64_t column = task % panels * Engine::kColumns;
    const int64_t first_row = task / panels * plan.task_rows;
    const int64_t rows = lesser(plan.task_rows, g.m - first_row);
    char* const panel = scratch;
    char* const tile_scratch = scratch + Engine::kPanelBytes;
    char* const factor = tile_scratch + Engine::kTileBytes;
    float* const sums = reinterpret_cast<float*>(factor + low_rank_bytes<Engine>(g));
    if constexpr (Engine::kFuses) {
        if (g.low_rank) Engine::low_rank_panel(g, column, factor);
    }
    using Heights = std::make_integer_sequence<int, Engine::kRows>;
    // Tiles of nearly equal height: 16 rows are 6 + 5 + 5, not 6 + 6 + 4.
    const int64_t tiles = ceil_div(rows, Engine::kRows);

    const int64_t chunks = ceil_div(g.depth, Engine::kDepth);
    // Panels of nearly equal depth: of 4097 terms not one panel of 4096 and one of 1.
    const int64_t most_depth = chunks ? ceil_div(ceil_div(g.depth, chunks), 64) * 64 : 0;
    // A product without terms still writes the bias.
    for (int64_t chunk = 0; chunk < (chunks ? chunks : 1); ++chunk) {
        const int64_t begin = chunk * most_depth;
        const int64_t depth = lesser(most_depth, g.depth - begin);
        if (depth > 0) Engine::panel(g, column, begin, depth, panel);
        for (int64_t i = 0; i < tiles; ++i) {
            const int64_t from = rows * i / tiles, to = rows * (i + 1) / tiles;
            const int64_t row = first_row + from;
            Tile<T> tile = {};
            tile.x = static_cast<const T*>(g.x) + row * g.stride_x + begin;
            tile.stride_x = g.stride_x;
            tile.depth = depth;
            tile.panel = panel;
            tile.sums = sums + from * Engine::kColumns;
            tile.first = chunk == 0;
            tile.last = chunk + 1 >= chunks;
            tile.bias = g.bias ? static_cast<const T*>(g.bias) + column : nullptr;
            tile.y = static_cast<T*>(g.y) + row * g.stride_y + column;
            tile.stride_y = g.stride_y;
            tile.columns = lesser(Engine::kColumns, g.columns - column);
            if (const LowRank* const low = g.low_rank) {
                tile.s = static_cast<const T*>(low->s) + row * low->stride_s;
                tile.stride_s = low->stride_s;
                tile.r = low->r;
                tile.factor = factor;
                tile.mask = low->mask ? low->mask + row * low->stride_mask + column / 8 : nullptr;
                tile.stride_mask = low->stride_mask;
            }
            run_tile<Engine>(static_cast<int>(to - from), tile, tile_scratch, Heights{});
        }
    }
}

}  // namespace
}  // namespace lora_ops
