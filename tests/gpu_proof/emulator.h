// csrc/cuda/device.h for the host: kernels run thread by thread, each a fiber that yields where threads meet, and every
// address is checked. What it reports, the first of each launch: an access outside of the memory that was allowed or not
// aligned to its size, an element written twice, shared memory beyond the launch's or read before it was written, lanes
// that meet in different operations, a thread that waits for one that never comes.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <unordered_set>
#include <vector>

#include "../../csrc/cpu/common/scalar.h"
#include "lora_ops.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint4 {
    uint32_t x, y, z, w;
};
struct dim3 {
    unsigned x, y;
    dim3(unsigned x, unsigned y) : x(x), y(y) {}
};
using std::min;

namespace emulator {

constexpr int kMostShared = 99 * 1024;  // sm_89 and sm_120 have the least
constexpr size_t kStack = 64 * 1024;

struct Span {
    uintptr_t begin, end;
    bool writable;
};
struct Operands {
    uint32_t values[6];
};
enum Operation { kNone, kShuffle, kUniform, kMma };
struct Warp {
    Operation operation = kNone;
    int arrived = 0, generation = 0;
    Operands slots[2][32];
};
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
};

struct State {
    // Set by the tests.
    std::vector<Span> spans;
    bool reversed = false;
    int64_t only_x = -1;  // if not negative: one block of pretended memory, where loads give zeros
    // What happened.
    std::string error;
    int64_t loaded = 0, stored = 0, shared_asked = 0, blocks = 0;
    std::unordered_set<uintptr_t> written;
    // The block in progress.
    std::vector<char> shared;
    std::vector<bool> shared_written;
    std::vector<Warp> warps;
    std::vector<Fiber> fibers;
    ucontext_t scheduler;
    std::function<void()> body;
    int thread = 0, arrived = 0, generation = 0;
    int64_t progress = 0, block_x = 0, block_y = 0;
};
inline State state;

inline void fail(const std::string& what) {
    if (!state.error.empty()) return;
    state.error = "block (" + std::to_string(state.block_x) + ", " + std::to_string(state.block_y) + "), thread " +
                  std::to_string(state.thread) + ": " + what;
}

inline void yield() {
    Fiber& fiber = state.fibers[state.thread];
    swapcontext(&fiber.context, &state.scheduler);
}

inline void enter() {
    state.body();
    state.fibers[state.thread].done = true;
    ++state.progress;
}

inline const Operands* meet(Operation operation, const Operands& mine) {
    Warp& warp = state.warps[state.thread / 32];
    if (warp.arrived == 0) warp.operation = operation;
    if (warp.operation != operation) fail("lanes of a warp meet in different operations");
    const int generation = warp.generation;
    Operands* slots = warp.slots[generation & 1];
    slots[state.thread % 32] = mine;
    if (++warp.arrived == 32) {
        warp.arrived = 0;
        ++warp.generation;
        ++state.progress;
    } else {
        while (warp.generation == generation) yield();
    }
    return slots;
}

inline bool allowed(const void* p, size_t bytes, bool write) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p);
    if (at % bytes) fail("an access of " + std::to_string(bytes) + " bytes is not aligned");
    for (const Span& span : state.spans) {
        if (at >= span.begin && at + bytes <= span.end && (span.writable || !write)) return true;
    }
    fail((write ? "a store of " : "a load of ") + std::to_string(bytes) + " bytes is out of bounds");
    return false;
}

template <class T>
T load(const T* p) {
    state.loaded += sizeof(T);
    T value{};
    if (allowed(p, sizeof(T), false) && state.only_x < 0) memcpy(&value, p, sizeof(T));
    return value;
}

// Runs the lanes of a warp in turn until all have to wait for other warps, or are done; whether any came further.
inline bool run_warp(int warp) {
    const int64_t start = state.progress;
    for (int64_t before = -1; before != state.progress;) {
        before = state.progress;
        for (int lane = 0; lane < 32; ++lane) {
            state.thread = 32 * warp + (state.reversed ? 31 - lane : lane);
            if (!state.fibers[state.thread].done) swapcontext(&state.scheduler, &state.fibers[state.thread].context);
        }
    }
    return state.progress != start;
}

// A warp runs as far ahead of the others as barriers let it, in ascending or descending order: what is read without the
// barrier that it needs is missing in one of the two.
inline void run_block(int threads) {
    state.warps.assign(threads / 32, Warp{});
    state.arrived = state.generation = 0;
    std::fill(state.shared.begin(), state.shared.end(), char(0xff));
    std::fill(state.shared_written.begin(), state.shared_written.end(), false);
    if (static_cast<int>(state.fibers.size()) < threads) state.fibers.resize(threads);
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = state.fibers[i];
        if (!fiber.stack) fiber.stack.reset(new char[kStack]);
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = &state.scheduler;
        makecontext(&fiber.context, enter, 0);
    }
    for (bool moved = true; moved;) {
        moved = false;
        for (int i = 0; i < threads / 32; ++i) moved |= run_warp(state.reversed ? threads / 32 - 1 - i : i);
    }
    for (int i = 0; i < threads; ++i) {
        state.thread = i;
        if (!state.fibers[i].done) return fail("waits for a thread that never comes");
    }
}

}  // namespace emulator

namespace lora_ops {
namespace {

inline float multiply(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }

template <class T>
T load(const T* p) {
    return emulator::load(p);
}
inline uint4 load16(const void* p) { return emulator::load(static_cast<const uint4*>(p)); }
inline uint4 stream16(const void* p) { return emulator::load(static_cast<const uint4*>(p)); }
template <class T>
void store(T* p, T value) {
    emulator::state.stored += sizeof(T);
    if (!emulator::allowed(p, sizeof(T), true)) return;
    if (!emulator::state.written.insert(reinterpret_cast<uintptr_t>(p)).second) emulator::fail("an element is written twice");
    if (emulator::state.only_x < 0) *p = value;
}

struct Shared {
    static bool inside(uint32_t offset, size_t bytes) {
        if (offset % bytes == 0 && offset + bytes <= emulator::state.shared.size()) return true;
        emulator::fail("shared memory beyond the launch's, or not aligned");
        return false;
    }
    template <class T>
    static T get(uint32_t offset) {
        T value{};
        if (!inside(offset, sizeof(T))) return value;
        for (size_t i = 0; i < sizeof(T); i += 4) {
            if (!emulator::state.shared_written[(offset + i) / 4]) emulator::fail("shared memory is read before it is written");
        }
        memcpy(&value, &emulator::state.shared[offset], sizeof(T));
        return value;
    }
    template <class T>
    static void put(uint32_t offset, T value) {
        if (!inside(offset, sizeof(T))) return;
        memcpy(&emulator::state.shared[offset], &value, sizeof(T));
        for (size_t i = 0; i < sizeof(T); i += 4) emulator::state.shared_written[(offset + i) / 4] = true;
    }
};

inline int thread_index() { return emulator::state.thread; }
inline int64_t block_x() { return emulator::state.block_x; }
inline int64_t block_y() { return emulator::state.block_y; }

inline void sync_block() {
    emulator::State& s = emulator::state;
    const int generation = s.generation;
    if (++s.arrived == static_cast<int>(s.warps.size()) * 32) {
        s.arrived = 0;
        ++s.generation;
        ++s.progress;
    } else {
        while (s.generation == generation) emulator::yield();
    }
}

template <class T>
T shuffle(T value, int lane) {
    static_assert(sizeof(T) == 4, "shuffles move 32 bits");
    emulator::Operands mine{};
    memcpy(mine.values, &value, 4);
    const emulator::Operands* all = emulator::meet(emulator::kShuffle, mine);
    memcpy(&value, all[lane & 31].values, 4);
    return value;
}
template <class T>
T shuffle_xor(T value, int mask) {
    return shuffle(value, (thread_index() & 31) ^ mask);
}
inline int uniform(int value) {
    const emulator::Operands* all = emulator::meet(emulator::kUniform, {{static_cast<uint32_t>(value)}});
    for (int lane = 0; lane < 32; ++lane) {
        if (static_cast<int>(all[lane].values[0]) != value) emulator::fail("a value is not uniform");
    }
    return value;
}

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t nibble = selector >> 4 * i & 15;
        if (nibble & 8) emulator::fail("bit 3 of a selector replicates the sign: never meant here");
        result |= static_cast<uint32_t>(both >> 8 * nibble & 255) << 8 * i;
    }
    return result;
}

// PTX ISA, "matrix fragments for mma.m16n8k16 with floating point type", for .f16 and .bf16: lane 4 g + t holds of A the
// elements (row, k) = (g or g + 8, 2 t + {0, 1} or 2 t + 8 + {0, 1}), of B (k, n) = (2 t + {0, 1} or + 8, g), and of C
// (row, n) = (g or g + 8, 2 t + {0, 1}).
template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const emulator::Operands* all = emulator::meet(emulator::kMma, {{a[0], a[1], a[2], a[3], b0, b1}});
    const int g = (thread_index() & 31) / 4, t = thread_index() & 3;
    const auto part = [](uint32_t pair, int i) {
        return static_cast<double>(to_float(T{static_cast<uint16_t>(pair >> 16 * i)}));
    };
    for (int e = 0; e < 4; ++e) {
        const int high_row = e / 2, n = 2 * t + e % 2;
        double sum = c[e];
        for (int s = 0; s < 4; ++s) {
            for (int i = 0; i < 2; ++i) {
                sum += part(all[4 * g + s].values[high_row], i) * part(all[4 * n + s].values[4], i);
                sum += part(all[4 * g + s].values[2 + high_row], i) * part(all[4 * n + s].values[5], i);
            }
        }
        c[e] = static_cast<float>(sum);
    }
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared, void*, Arguments... arguments) {
    emulator::State& s = emulator::state;
    s.shared_asked = std::max<int64_t>(s.shared_asked, shared);
    if (shared > emulator::kMostShared) emulator::fail("more shared memory than every chip has");
    s.shared.assign(shared, 0);
    s.shared_written.assign(shared / 4, false);
    s.body = [=] { kernel(arguments...); };
    s.blocks = grid.x;
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x && s.error.empty(); ++x) {
            if (s.only_x >= 0 && x != static_cast<uint64_t>(s.only_x)) x = static_cast<unsigned>(s.only_x);
            s.block_x = x;
            s.block_y = y;
            emulator::run_block(threads);
            if (s.only_x >= 0) break;
        }
    }
    return s.error.empty() ? 0 : 1;
}

}  // namespace
}  // namespace lora_ops

extern "C" {

// Forgets what was allowed and what happened. only_x: run one column of blocks, on memory that is only pretended.
LORA_OPS_API __attribute__((used)) inline void emulator_reset(int reversed, int64_t only_x) {
    emulator::State& s = emulator::state;
    s.spans.clear();
    s.written.clear();
    s.error.clear();
    s.reversed = reversed;
    s.only_x = only_x;
    s.loaded = s.stored = s.shared_asked = s.blocks = 0;
}
LORA_OPS_API __attribute__((used)) inline void emulator_allow(uint64_t begin, int64_t bytes, int writable) {
    emulator::state.spans.push_back({static_cast<uintptr_t>(begin), static_cast<uintptr_t>(begin + bytes), writable != 0});
}
LORA_OPS_API __attribute__((used)) inline const char* emulator_error(void) { return emulator::state.error.c_str(); }
// 0: bytes loaded, 1: bytes stored, 2: the most shared memory of a launch, 3: blocks of the last launch along x.
LORA_OPS_API __attribute__((used)) inline int64_t emulator_count(int what) {
    const emulator::State& s = emulator::state;
    const int64_t counts[] = {s.loaded, s.stored, s.shared_asked, s.blocks};
    return counts[what];
}

}  // extern "C"
