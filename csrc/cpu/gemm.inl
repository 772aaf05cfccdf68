// A product with a frozen weight, blocked for the cache; written once for every instruction set.
//
// The weight is decoded, or copied, panel by panel: kColumns columns of the output and up to kDepth terms of their sums,
// laid out as the micro-kernel reads it. A panel stays in the L2 cache and is multiplied with all rows of the task. Sums stay
// in registers over a panel and, where one panel does not hold a whole sum, wait in fp32 for the next.
//
// Engine supplies, for its element type T of a, bias and out:
//   kRows, kColumns       the micro-kernel's tile: accumulators that fit the registers
//   kDepth                terms of a panel, even
//   kPanelBytes           of a panel
//   kTileBytes            scratch of a tile
//   void panel(const Gemm&, int64_t column, int64_t begin, int64_t depth, void* panel)
//                         columns [column, column + kColumns), zero beyond the last, terms [begin, begin + depth)
//   void tile<rows>(const Tile<T>&, void* scratch)    rows <= kRows
//   kFuses                whether it adds low-rank updates, with
//   void low_rank_panel(const Gemm&, int64_t column, void* panel)

#include <string.h>

#include <utility>

namespace lora_ops {
namespace {

constexpr int64_t kTaskRows = 2048;       // x's rows of a task stay in L3, and decoding again costs 0.5 %
constexpr int64_t kFewestTaskRows = 128;  // below, decoding again for another thread costs more than it gains

template <class T>
struct Tile {
    const T* a;
    int64_t stride_a;
    int64_t depth;
    const void* panel;
    float* sums;  // [rows, kColumns]
    bool first, last;
    const T* bias;
    T* out;
    int64_t stride_out;
    int64_t columns;
    // The low-rank update, added to the last sums: left [rows, rank], its panel, and its bits or NULL.
    const T* left;
    int64_t stride_left, rank;
    const void* right;
    const uint8_t* bits;
    int64_t stride_bits;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

template <class Engine>
int64_t low_rank_bytes(const Gemm& g) {
    return g.low_rank ? (g.low_rank->rank + 1) / 2 * 2 * Engine::kColumns * int64_t{2} : 0;
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

template <class Engine, class T>
void panel_task(const Gemm& g, const GemmPlan& plan, int64_t task, char* scratch) {
    const int64_t panels = ceil_div(g.columns, Engine::kColumns);
    const int64_t column = task % panels * Engine::kColumns;
    const int64_t first_row = task / panels * plan.task_rows;
    const int64_t rows = lesser(plan.task_rows, g.m - first_row);
    char* const panel = scratch;
    char* const tile_scratch = scratch + Engine::kPanelBytes;
    char* const right = tile_scratch + Engine::kTileBytes;
    float* const sums = reinterpret_cast<float*>(right + low_rank_bytes<Engine>(g));
    if constexpr (Engine::kFuses) {
        if (g.low_rank) Engine::low_rank_panel(g, column, right);
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
            tile.a = static_cast<const T*>(g.a) + row * g.stride_a + begin;
            tile.stride_a = g.stride_a;
            tile.depth = depth;
            tile.panel = panel;
            tile.sums = sums + from * Engine::kColumns;
            tile.first = chunk == 0;
            tile.last = chunk + 1 >= chunks;
            tile.bias = g.bias ? static_cast<const T*>(g.bias) + column : nullptr;
            tile.out = static_cast<T*>(g.out) + row * g.stride_out + column;
            tile.stride_out = g.stride_out;
            tile.columns = lesser(Engine::kColumns, g.columns - column);
            if (const LowRank* const low = g.low_rank) {
                tile.left = static_cast<const T*>(low->left) + row * low->stride_left;
                tile.stride_left = low->stride_left;
                tile.rank = low->rank;
                tile.right = right;
                tile.bits = low->bits ? low->bits + row * low->stride_bits + column / 8 : nullptr;
                tile.stride_bits = low->stride_bits;
            }
            run_tile<Engine>(static_cast<int>(to - from), tile, tile_scratch, Heights{});
        }
    }
}

// The scales of n groups of 64 elements from element `first` on; blocks and `first` are multiples of 64. Blocks are
// counted, not divided for: a division takes as long as decoding 64 elements.
inline void scales_of_64(const lora_ops_nf4_weight& w, int64_t first, int64_t n, float* scales) {
    const int64_t groups = w.block_size / 64;  // of a block
    int64_t block = first / w.block_size;
    if (groups == 1 && w.absmax) {
        memcpy(scales, w.absmax + block, sizeof(float) * n);
        return;
    }
    if (groups == 1) {
        for (int64_t i = 0; i < n; ++i) scales[i] = nf4_absmax(w, block + i);
        return;
    }
    int64_t left = groups - first % w.block_size / 64;
    for (int64_t i = 0; i < n; ++block, left = groups) {
        const float scale = nf4_absmax(w, block);
        for (const int64_t end = lesser(i + left, n); i < end; ++i) scales[i] = scale;
    }
}

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
