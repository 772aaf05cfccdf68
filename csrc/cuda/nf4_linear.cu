// y = x Wᵀ + b over an NF4 weight for few tokens, decoded on the way into matrix instructions.
//
// Limits on an H200, [14336, 4096]: 6.3 µs of memory traffic leave about 3 lane instructions a weight (1 token), 4 to 9 are
// what 16 to 64 tokens can bear. Here a byte of codes, two weights, costs one byte permute, which forms the address, and
// one load from a table of 256 pairs in shared memory; the products are the matrix unit's, also for a single token.
//
// A team of warps has 32 rows of W (two operands of 16); its warps take steps of 128 elements of K in turn, and their sums
// are added in one fixed order at the end: no atomics, results repeat bit for bit and do not depend on the GPU.
//
// The operands are code · c rounded to T, exact products of them with x are summed in fp32 over a block, and the block's
// sum is scaled by absmax in fp32. c makes the rounding harmless: all 16 values of NF4 are within 0.41 (bf16) and 0.35
// (fp16) of the unit roundoff, where rounding W itself errs by up to 1.
#include "lora_ops_cuda.h"

#include "device.h"
#include "../cpu/nf4/table.h"

namespace lora_ops {
namespace {

constexpr int kRows = 32;        // of W, a team's tile
constexpr int kStep = 128;       // elements of K: 64 bytes of each row, 16 a lane
constexpr int kBlock = 64;       // elements whose products are summed before they are scaled
constexpr int kTokens = 8;       // columns of a matrix instruction
constexpr int kGroupShift = 8;   // 256 absmax values share an fp32 scale when double-quantized

// Pairs of values by byte of codes. An entry is 32 copies, one for each bank, so that lanes never wait for one another, in
// 256 bytes: the byte's place in an address is then a whole byte, and a permute puts it there.
constexpr int kEntry = 256;
constexpr int kTable = 256 * kEntry;

template <class T>
constexpr float kCodeScale = 0;
template <>
constexpr float kCodeScale<BF16> = 1.18878173828125f;
template <>
constexpr float kCodeScale<F16> = 1.63848876953125f;

// 65,536 registers an SM: 128 a thread of 16 warps, 255 of 8, where more accumulators than that are needed.
template <int TILES>
constexpr int kWarps = TILES <= 2 ? 16 : 8;
// Enough warps for the 132 SMs of an H200; the same number on every chip, so that results are, too.
constexpr int kTargetSMs = 132;

struct Arguments {
    lora_ops_cuda_nf4_weight w;
    const void* x;
    const void* bias;
    void* y;
    int64_t m, n, stride_x;
    int k, block_shift;
};

template <bool NESTED>
__device__ __forceinline__ float load_absmax(const lora_ops_cuda_nf4_weight& w, int64_t block) {
    if (!NESTED) return load(w.absmax + block);
    const float value = load(w.absmax_map + load(w.absmax_codes + block));
    return add(multiply(value, load(w.nested_absmax + (block >> kGroupShift))), load(w.nested_offset));
}

// NF4_CODE[code] by selects, for filling tables.
template <int I = 15>
__device__ __forceinline__ float select_code(int code) {
    constexpr float value = kNF4Code[I];
    if constexpr (I == 0) {
        return value;
    } else {
        return code == I ? value : select_code<I - 1>(code);
    }
}

// Two threads an entry, 64 of its bytes each, in an order in which no two lanes store to the same banks.
template <class T>
__device__ __forceinline__ void fill_table(int threads) {
    const int lane = thread_index() & 31;
    const uint32_t mine = round_to<T>(select_code(lane & 15) * kCodeScale<T>).bits;
    for (int at = thread_index(); at < 2 * 256; at += threads) {
        const int byte = at / 2;
        const uint32_t pair = shuffle(mine, byte >> 4) | shuffle(mine, byte & 15) << 16;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            Shared::put(byte * kEntry + at % 2 * 64 + (i + lane / 2) % 4 * 16, uint4{pair, pair, pair, pair});
        }
    }
}

// Where a lane reads: rows g, g + 8, g + 16 and g + 24 of the tile, and the absmax of two of them. Rows beyond W stand for
// its last one, and elements beyond a row for its last 32: what is read there is never stored.
struct Rows {
    const uint8_t* packed[4];
    int64_t block[2];  // the row's first
};

struct Fetched {
    uint4 codes[4];
    float absmax[2];
};

__device__ __forceinline__ Rows rows_of(const Arguments& p, int64_t first_row, int lane) {
    const int g = lane >> 2, half = lane >> 1 & 1;
    Rows rows;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int64_t row = first_row + 8 * i + g;
        rows.packed[i] = p.w.packed + (row < p.n ? row : p.n - 1) * (p.k / 2);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64_t row = first_row + 16 * i + 8 * half + g;
        rows.block[i] = (row < p.n ? row : p.n - 1) * (p.k >> p.block_shift);
    }
    return rows;
}

template <bool NESTED>
__device__ __forceinline__ Fetched fetch(const Arguments& p, const Rows& rows, int k, int lane) {
    const int at = min(k + 32 * (lane & 3), p.k - 32) / 2;
    const int block = min(k + kBlock * (lane & 1), p.k - kBlock) >> p.block_shift;
    Fetched f;
#pragma unroll
    for (int i = 0; i < 4; ++i) f.codes[i] = stream16(rows.packed[i] + at);
#pragma unroll
    for (int i = 0; i < 2; ++i) f.absmax[i] = load_absmax<NESTED>(p.w, rows.block[i] + block);
    return f;
}

// 16 bytes of a row in each lane are half a block; afterwards a lane has 8 bytes of both blocks: codes[0 .. 1] belong to the
// first, codes[2 .. 3] to the second. Lane t's elements of a block begin at 32 (t % 2) + 16 (t / 2).
__device__ __forceinline__ void exchange(const uint4& mine, bool upper, uint32_t (&codes)[4]) {
    const uint32_t other0 = shuffle_xor(upper ? mine.x : mine.z, 2);
    const uint32_t other1 = shuffle_xor(upper ? mine.y : mine.w, 2);
    codes[0] = upper ? other0 : mine.x;
    codes[1] = upper ? other1 : mine.y;
    codes[2] = upper ? mine.z : other0;
    codes[3] = upper ? mine.w : other1;
}

__device__ __forceinline__ uint32_t decode(uint32_t codes, int byte, uint32_t bank) {
    return Shared::get<uint32_t>(permute_bytes(codes, bank, 0x5504u | byte << 4));
}

// Tiles of 8 tokens: TILES. split_shift: log2 of the warps of a team.
template <class T, int TILES, bool NESTED>
__global__ void __launch_bounds__(32 * kWarps<TILES>, 1) nf4_linear_kernel(Arguments p, int split_shift) {
    const int lane = thread_index() & 31, warp = uniform(thread_index() >> 5);
    const int g = lane >> 2, t = lane & 3;
    const bool upper = t >= 2;
    const int split = 1 << split_shift, team = warp >> split_shift, member = warp & (split - 1);
    const int64_t first_row = (block_x() * (kWarps<TILES> >> split_shift) + team) * kRows;
    const int64_t first_token = block_y() * (TILES * kTokens);
    const uint32_t bank = 4 * lane;

    const Rows rows = rows_of(p, first_row, lane);
    const T* x_rows[TILES];  // a lane's elements of each block begin here
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const int64_t token = first_token + kTokens * tile + g;
        x_rows[tile] = static_cast<const T*>(p.x) + (token < p.m ? token : p.m - 1) * p.stride_x;
        x_rows[tile] += 32 * (t & 1) + 16 * (t >> 1);
    }
    Fetched next = fetch<NESTED>(p, rows, member * kStep, lane);
    fill_table<T>(32 * kWarps<TILES>);
    sync_block();

    float sum[2][TILES][4] = {};
    for (int k = member * kStep; k < p.k; k += split * kStep) {
        uint32_t codes[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) exchange(next.codes[i], upper, codes[i]);
        const float absmax[2] = {next.absmax[0], next.absmax[1]};
        next = fetch<NESTED>(p, rows, k + split * kStep, lane);
#pragma unroll
        for (int block = 0; block < 2; ++block) {
            const int at = k + kBlock * block;
            if (at >= p.k) break;
            uint32_t w[2][4][4];  // operand, instruction, register
            float scale[2][2];    // operand, rows g or g + 8
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    scale[i][half] = shuffle(absmax[i], (lane & ~3) + 2 * half + block);
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const uint32_t word = codes[2 * i + half][2 * block + j / 2];
                        w[i][j][half] = decode(word, 2 * (j % 2), bank);
                        w[i][j][2 + half] = decode(word, 2 * (j % 2) + 1, bank);
                    }
                }
            }
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const uint4 low = load16(x_rows[tile] + at), high = load16(x_rows[tile] + at + 8);
                const uint32_t x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float product[4] = {};
#pragma unroll
                    for (int j = 0; j < 4; ++j) mma<T>(product, w[i][j], x[2 * j], x[2 * j + 1]);
#pragma unroll
                    for (int e = 0; e < 4; ++e) sum[i][tile][e] += product[e] * scale[i][e / 2];
                }
            }
        }
    }

    sync_block();  // the table has served; its place takes the warps' sums, [warp, row, token]
    constexpr int kSums = kRows * TILES * kTokens;
    static_assert(kWarps<TILES> * kSums * 4 <= kTable, "the sums fit the table's place");
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = 16 * i + 8 * (e / 2) + g, token = kTokens * tile + 2 * t + e % 2;
                Shared::put((warp * kSums + row * (TILES * kTokens) + token) * 4, sum[i][tile][e]);
            }
        }
    }
    sync_block();
    for (int e = member * 32 + lane; e < kSums; e += split * 32) {
        const int row = e % kRows, token = e / kRows;
        if (first_row + row >= p.n || first_token + token >= p.m) continue;
        float total = 0.0f;
        for (int i = 0; i < split; ++i) {
            const int from = (team << split_shift) + i;
            total += Shared::get<float>((from * kSums + row * (TILES * kTokens) + token) * 4);
        }
        total /= kCodeScale<T>;
        if (p.bias != nullptr) total += to_float(load(static_cast<const T*>(p.bias) + first_row + row));
        store(static_cast<T*>(p.y) + (first_token + token) * p.n + first_row + row, round_to<T>(total));
    }
}

// Any k and any block: a warp a row, a weight a lane at a time.
constexpr int kRaggedWarps = 8;

template <class T, bool NESTED>
__global__ void __launch_bounds__(32 * kRaggedWarps) nf4_linear_ragged_kernel(Arguments p) {
    const int lane = thread_index() & 31;
    const int64_t row = block_x() * kRaggedWarps + (thread_index() >> 5);
    const int64_t first_token = block_y() * kTokens;
    if (thread_index() < 16) Shared::put(thread_index() * 4, select_code(thread_index()));
    sync_block();
    if (row >= p.n) return;
    float sum[kTokens] = {};
    for (int k = lane; k < p.k; k += 32) {
        const int64_t e = row * p.k + k;
        const uint32_t byte = load(p.w.packed + e / 2);
        const uint32_t code = e % 2 ? byte & 15 : byte >> 4;
        const float w = Shared::get<float>(code * 4) * load_absmax<NESTED>(p.w, e >> p.block_shift);
#pragma unroll
        for (int token = 0; token < kTokens; ++token) {
            if (first_token + token < p.m) {
                sum[token] += w * to_float(load(static_cast<const T*>(p.x) + (first_token + token) * p.stride_x + k));
            }
        }
    }
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
        for (int mask = 16; mask > 0; mask /= 2) sum[token] += shuffle_xor(sum[token], mask);
    }
    if (lane != 0) return;
    const float bias = p.bias == nullptr ? 0.0f : to_float(load(static_cast<const T*>(p.bias) + row));
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
        if (first_token + token >= p.m) break;
        store(static_cast<T*>(p.y) + (first_token + token) * p.n + row, round_to<T>(sum[token] + bias));
    }
}

int64_t blocks_of(int64_t total, int64_t size) { return (total + size - 1) / size; }

bool on_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T, int TILES, bool NESTED>
int run(const Arguments& p, void* stream) {
    constexpr int warps = kWarps<TILES>;
    const int64_t tiles = blocks_of(p.n, kRows), steps = blocks_of(p.k, kStep);
    int shift = 0;
    while ((2 << shift) <= warps && (2 << shift) <= steps && (tiles << (shift + 1)) <= kTargetSMs * warps) ++shift;
    const dim3 grid(static_cast<unsigned>(blocks_of(tiles, warps >> shift)),
                    static_cast<unsigned>(blocks_of(p.m, TILES * kTokens)));
    return launch(nf4_linear_kernel<T, TILES, NESTED>, grid, 32 * warps, kTable, stream, p, shift);
}

template <class T, bool NESTED>
int run(const Arguments& p, void* stream) {
    const bool aligned = p.k > 0 && p.k % kBlock == 0 && p.w.block_size >= kBlock && p.k % p.w.block_size == 0 &&
                         on_16_bytes(p.w.packed) && on_16_bytes(p.x) && p.stride_x % 8 == 0;
    if (!aligned) {
        const dim3 grid(static_cast<unsigned>(blocks_of(p.n, kRaggedWarps)),
                        static_cast<unsigned>(blocks_of(p.m, kTokens)));
        return launch(nf4_linear_ragged_kernel<T, NESTED>, grid, 32 * kRaggedWarps, 16 * 4, stream, p);
    }
    if (p.m <= 8) return run<T, 1, NESTED>(p, stream);
    if (p.m <= 16) return run<T, 2, NESTED>(p, stream);
    if (p.m <= 32) return run<T, 4, NESTED>(p, stream);
    return run<T, 8, NESTED>(p, stream);
}

template <class T>
int run(const Arguments& p, void* stream) {
    return p.w.absmax == nullptr ? run<T, true>(p, stream) : run<T, false>(p, stream);
}

}  // namespace
}  // namespace lora_ops

extern "C" {

int lora_ops_cuda_abi_version(void) { return LORA_OPS_CUDA_ABI_VERSION; }

int lora_ops_cuda_nf4_linear(const lora_ops_cuda_nf4_weight* w, int64_t n, int64_t k, const void* x, int64_t m,
                             int64_t stride_x, const void* bias, void* y, int dtype, void* stream) {
    using namespace lora_ops;
    constexpr int64_t kMost = int64_t{1} << 30;  // of k, so that a step past it is an int; of m and n, by the grid
    if (w == nullptr || n < 0 || k < 0 || m < 0 || n > kMost || k > kMost || m > kTokens * 65535) return LORA_OPS_BAD_ARGUMENT;
    if (dtype != LORA_OPS_F16 && dtype != LORA_OPS_BF16) return LORA_OPS_BAD_ARGUMENT;
    if (w->block_size < 32 || (w->block_size & (w->block_size - 1))) return LORA_OPS_BAD_ARGUMENT;
    if (n == 0 || m == 0) return LORA_OPS_OK;
    int block_shift = 0;
    while ((int64_t{1} << block_shift) < w->block_size) ++block_shift;
    const Arguments p{*w, x, bias, y, m, n, stride_x, static_cast<int>(k), block_shift};
    const int error = dtype == LORA_OPS_F16 ? run<F16>(p, stream) : run<BF16>(p, stream);
    return error == 0 ? LORA_OPS_OK : LORA_OPS_CUDA_ERROR + error;
}

}  // extern "C"
