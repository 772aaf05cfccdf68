// The C ABI: checks arguments, picks the instruction set, splits the work over threads.
// Compiled for the baseline of the architecture, so that it runs anywhere.
#include <math.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "checksum.h"
#include "gemm.h"
#include "kernels.h"
#include "nf4_table.h"
#include "scalar.h"

#if defined(LORA_OPS_X86)
#include <cpuid.h>
#endif

namespace lora_ops {
namespace {

// Below this many elements waking a thread costs more than it saves.
constexpr int64_t kElementsPerThread = 1 << 15;

std::atomic<int> forced_isa{LORA_OPS_ISA_AUTO};

bool machine_has(int isa) {
    if (isa == LORA_OPS_ISA_PORTABLE) return true;
#if defined(LORA_OPS_X86)
    unsigned eax, ebx, ecx, edx;
    const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
    // __builtin_cpu_supports also asks whether the operating system saves the wide registers.
    const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == LORA_OPS_ISA_AVX2) return avx2;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (isa == LORA_OPS_ISA_AVX512) return avx512;
    if (isa == LORA_OPS_ISA_AVX512_BF16) {
        return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
    }
#endif
    return false;
}

int best_isa() {
    static const int best = machine_has(LORA_OPS_ISA_AVX512_BF16) ? LORA_OPS_ISA_AVX512_BF16
                            : machine_has(LORA_OPS_ISA_AVX512)    ? LORA_OPS_ISA_AVX512
                            : machine_has(LORA_OPS_ISA_AVX2)      ? LORA_OPS_ISA_AVX2
                                                                  : LORA_OPS_ISA_PORTABLE;
    return best;
}

int current_isa() {
    const int forced = forced_isa.load(std::memory_order_relaxed);
    return forced == LORA_OPS_ISA_AUTO ? best_isa() : forced;
}

const Kernels& kernels() {
#if defined(LORA_OPS_X86)
    switch (current_isa()) {
        case LORA_OPS_ISA_AVX2: return kAvx2Kernels;
        case LORA_OPS_ISA_AVX512:
        case LORA_OPS_ISA_AVX512_BF16: return kAvx512Kernels;
    }
#endif
    return kPortableKernels;
}

}  // namespace

const Blockwise8Kernels& blockwise8_kernels() {
#if defined(LORA_OPS_X86)
    switch (current_isa()) {
        case LORA_OPS_ISA_AVX2: return kAvx2Blockwise8;
        case LORA_OPS_ISA_AVX512: return kAvx512Blockwise8;
        case LORA_OPS_ISA_AVX512_BF16: return kAvx512VbmiBlockwise8;
    }
#endif
    return kPortableBlockwise8;
}

namespace {

const GemmKernels& gemm_kernels() {
#if defined(LORA_OPS_X86)
    switch (current_isa()) {
        case LORA_OPS_ISA_AVX2: return kAvx2Gemm;
        case LORA_OPS_ISA_AVX512: return kAvx512Gemm;
        case LORA_OPS_ISA_AVX512_BF16: return kAvx512Bf16Gemm;
    }
#endif
    return kPortableGemm;
}

// Calls work(begin, end) on pieces of [begin, end) that meet at multiples of align, one piece a thread.
template <class Work>
void parallel(int64_t begin, int64_t end, int64_t align, int n_threads, Work work) {
    const int64_t useful = (end - begin + kElementsPerThread - 1) / kElementsPerThread;
    const int64_t pieces = std::min<int64_t>(n_threads, useful);
    if (pieces <= 1) return work(begin, end);
    const int64_t first = begin / align;
    const int64_t blocks = (end + align - 1) / align - first;
#pragma omp parallel for num_threads(static_cast<int>(pieces)) schedule(static, 1)
    for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t from = std::max(begin, (first + blocks * piece / pieces) * align);
        const int64_t to = std::min(end, (first + blocks * (piece + 1) / pieces) * align);
        if (from < to) work(from, to);
    }
}

int64_t size_of(int dtype) { return dtype == LORA_OPS_F32 ? 4 : 2; }
bool is_dtype(int dtype) { return dtype == LORA_OPS_F32 || dtype == LORA_OPS_F16 || dtype == LORA_OPS_BF16; }

// Memory of the calling thread that stays allocated until the thread ends: fresh pages cost as much as a small product.
class Scratch {
public:
    // At least `bytes`, aligned to a cache line, with the contents undefined; or NULL.
    char* get(int64_t bytes) {
        if (size_ < bytes) {
            memory_.reset();
            memory_.reset(new (std::align_val_t{64}, std::nothrow) char[bytes]);
            size_ = memory_ ? bytes : 0;
        }
        return memory_.get();
    }

private:
    struct Free {
        void operator()(char* p) const { operator delete[](p, std::align_val_t{64}); }
    };
    std::unique_ptr<char[], Free> memory_;
    int64_t size_ = 0;
};

// A function of its own, so that every thread of a team passes the declaration and frees its memory when it ends.
char* thread_scratch(int64_t bytes) {
    thread_local Scratch scratch;
    return scratch.get(bytes);
}

bool is_valid(const lora_ops_nf4_weight* w) {
    if (!w || w->block_size <= 0 || w->block_size % 32) return false;
    const bool nested = w->absmax_codes && w->absmax_map && w->nested_absmax;
    return w->packed && (w->absmax || nested);
}

}  // namespace

bool gemm_fuses(const Gemm& g) {
    const GemmKernels& isa = gemm_kernels();
    return isa.fuses && isa.fuses(g);
}

int run_gemm(const Gemm& g, int n_threads) {
    if (g.n < 0 || g.k < 0 || g.m < 0 || n_threads < 1 || !is_dtype(g.dtype)) return LORA_OPS_BAD_ARGUMENT;
    if (g.m == 0 || g.columns == 0) return LORA_OPS_OK;
    if (!g.out || (g.m > 1 && g.stride_out < g.columns)) return LORA_OPS_BAD_ARGUMENT;
    if (g.depth > 0 && (!g.a || (!g.dense && !is_valid(&g.w)))) return LORA_OPS_BAD_ARGUMENT;
    if ((g.dense || g.low_rank) && !gemm_fuses(g)) return LORA_OPS_BAD_ARGUMENT;
    const GemmKernels& isa = gemm_kernels();
    const GemmPlan plan = isa.plan(g, n_threads);
    const int64_t useful = g.n * g.k / kElementsPerThread + 1;
    const int threads = static_cast<int>(std::min({int64_t{n_threads}, plan.tasks, useful}));
    thread_local Scratch shared_scratch;
    char* const shared = shared_scratch.get(plan.shared_bytes);
    if (plan.shared_bytes && !shared) return LORA_OPS_NO_MEMORY;
    if (isa.prepare) isa.prepare(g, plan, shared);
    std::atomic<bool> has_memory{true};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int64_t task = 0; task < plan.tasks; ++task) {
        char* const memory = thread_scratch(plan.scratch_bytes);
        if (plan.scratch_bytes && !memory) {
            has_memory.store(false, std::memory_order_relaxed);
        } else {
            isa.task(g, plan, task, shared, memory);
        }
    }
    return has_memory.load(std::memory_order_relaxed) ? LORA_OPS_OK : LORA_OPS_NO_MEMORY;
}

namespace {

void make_search(Blockwise8Code& code) {
    for (int i = 0; i < 255; ++i) {
        // Exact: neighbours of a map are close enough in magnitude for their sum to fit a double.
        const double midpoint = (double{code.map[i]} + double{code.map[i + 1]}) / 2;
        const float nearest = static_cast<float>(midpoint);
        code.threshold[i] = double{nearest} > midpoint ? nextafterf(nearest, -INFINITY) : nearest;
    }
    code.threshold[255] = INFINITY;

    // One sweep over the bins from -1 to 1; below counts the thresholds under a rising v.
    int below = 0;
    const auto fill = [&](uint8_t& start, float least, float most) {
        while (code.threshold[below] < least) ++below;
        start = static_cast<uint8_t>(below);
        while (code.threshold[below] < most) ++below;
        code.most_steps = std::max(code.most_steps, below - start);
    };
    const auto least = [](int bin) { return bits_float(bin ? uint32_t(Blockwise8Code::kFirstKey + bin) << 16 : 0); };
    const auto most = [](int bin) { return bits_float((uint32_t(Blockwise8Code::kFirstKey + bin + 1) << 16) - 1); };
    for (int bin = code.kBins - 1; bin >= 0; --bin) fill(code.start[code.kBins + bin], -most(bin), -least(bin));
    for (int bin = 0; bin < code.kBins; ++bin) fill(code.start[bin], least(bin), most(bin));
}

// What blockwise8_avx512.inl computes from the upper half of the bits of 2 |v|, not below those of the first bin.
int line_guess(const Blockwise8Code& code, uint32_t half) {
    const uint32_t e = half >> 8, swapped = (half << 8 & 0xff00) | e;
    const int line = swapped > code.bend[e & 31] ? 0 : 1;
    return static_cast<int>(((swapped * code.rise[line][e & 31] >> 16) + code.base[line][e & 31]) >> 8);
}

// Decade d of a dynamic map, from 10^(d - 7) to 10^(d - 6), holds 2^d values of each sign, or 2^(d + 1) of one, so its
// line rises by as many: half a code above the number of thresholds where it crosses one.
void make_lines(Blockwise8Code& code) {
    code.is_signed = code.map[0] < 0;
    const int zero = code.is_signed ? 127 : 0, last = 31;
    const auto values = [&](int d) { return code.is_signed ? 1 << d : 2 << d; };
    const auto line = [&](int d, double a) {
        const int before = values(d) - values(0);
        return zero + before + 0.5 + values(d) * (a / pow(10, d - 6) - 0.1) / 0.9;
    };
    for (int e = 0; e < last; ++e) {
        const double low = ldexp(1, e - last), high = 2 * low;
        int decade[2];  // in which the binade ends, and begins
        for (int i = 0; i < 2; ++i) {
            int& d = decade[i] = 0;
            while (d < 6 && (i ? low : high) > pow(10, d - 6)) ++d;
            const double rise = lround(256 * (line(d, high) - line(d, low)));
            code.rise[i][e] = static_cast<uint16_t>(rise);
            // The factor of the rise is the fraction and, below it, the exponent.
            const double below = rise * (code.kFirstExponent + e) / 65536;
            code.base[i][e] = static_cast<uint16_t>(lround(256 * line(d, low) - below));
        }
        const double bend = decade[0] == decade[1] ? low : pow(10, decade[1] - 6);
        code.bend[e] = static_cast<uint16_t>(static_cast<int>(256 * (bend / low - 1)) << 8 | 0xff);
    }
    for (int i = 0; i < 2; ++i) {  // 1 and, with the same low bits of the exponent, inf and NaN: the last code but one
        code.bend[last] = 0;
        code.rise[i][last] = 0;
        code.base[i][last] = 254 << 8;
    }

    // The search starts at the guess and goes on by one at most: that must do for all values of every bin.
    int below = zero;
    const auto count = [&](float v) {  // thresholds below a rising v
        while (code.threshold[below] < v) ++below;
        return below;
    };
    code.linear = code.threshold[zero] >= ldexp(1, -last);  // smaller values are taken for that
    for (uint32_t half = code.kFirstExponent << 8; half < 127 << 8; ++half) {
        const int guess = line_guess(code, half);
        code.linear &= guess <= count(bits_float(half << 15)) && count(bits_float((half << 15) + 0x7fff)) <= guess + 1;
    }
    code.linear &= count(1) == 255;

    for (int i = 0; i < 255; ++i) code.doubled[i] = 2 * float_bits(code.threshold[i]);
    if (!code.is_signed) return;
    code.linear &= float_bits(code.map[zero]) == 0;
    for (int i = 0; i < zero; ++i) {
        code.linear &= code.map[zero + 1 + i] == -code.map[zero - 1 - i];
        // Where the midpoint is no fp32 number, its double is odd: v and -v are both above it or both below it.
        code.doubled[zero + i] += code.threshold[zero + i] != -code.threshold[zero - 1 - i];
    }
    code.doubled[255] = code.doubled[zero];
}

Blockwise8Code make_code(const float* map) {
    Blockwise8Code code = {};
    memcpy(code.map, map, sizeof code.map);
    make_search(code);
    make_lines(code);
    for (int i = 0; i < 256; ++i) {
        for (int byte = 0; byte < 4; ++byte) {
            code.map_bytes[byte][i] = static_cast<uint8_t>(float_bits(code.map[i]) >> 8 * byte);
            code.doubled_bytes[byte][i] = static_cast<uint8_t>(code.doubled[i] >> 8 * byte);
        }
    }
    return code;
}

}  // namespace

// A code costs 60 µs to make, as much as the step of a small model; nearly every call brings one of the same two maps.
std::shared_ptr<const Blockwise8Code> code_of(const float* map) {
    static std::mutex mutex;
    static std::shared_ptr<const Blockwise8Code> kept[2];
    const std::lock_guard<std::mutex> hold(mutex);
    auto& last = kept[map[0] < 0];
    if (!last || memcmp(last->map, map, sizeof last->map)) last = std::make_shared<const Blockwise8Code>(make_code(map));
    return last;
}

bool is_valid(const lora_ops_adamw_slice& s, int64_t rows) {
    if (s.n < 0 || s.row < 0 || s.row >= rows || s.first % 256) return false;
    if (!is_dtype(static_cast<int>(s.param_dtype)) || !is_dtype(static_cast<int>(s.grad_dtype))) return false;
    if (!s.exp_avg_absmax != !s.exp_avg_sq_absmax) return false;
    return s.n == 0 || (s.param && s.grad && s.exp_avg && s.exp_avg_sq);
}

Checksum::Checksum() {
    for (int i = 0; i < kChecksumLanes; ++i) lanes_[i] = (i + uint64_t{1}) * kChecksumFactor;
}

void Checksum::add(const void* bytes, int64_t n) {
    const char* const data = static_cast<const char*>(bytes);
    const int64_t whole = n / kChecksumRow * kChecksumRow;
    kernels().checksum_rows(lanes_, data, whole / kChecksumRow);
    if (whole < n) {
        char last[kChecksumRow] = {};
        memcpy(last, data + whole, static_cast<size_t>(n - whole));
        kernels().checksum_rows(lanes_, last, 1);
    }
    total_ += static_cast<uint64_t>(n);
}

uint64_t Checksum::value() const {
    uint64_t total = total_;
    for (const uint64_t lane : lanes_) total = checksum_mix(total, lane);
    return total ^ total >> 32;
}

}  // namespace lora_ops

using namespace lora_ops;

int lora_ops_abi_version(void) { return LORA_OPS_ABI_VERSION; }

int lora_ops_get_isa(void) { return current_isa(); }

int lora_ops_supports_isa(int isa) { return machine_has(isa); }

int lora_ops_force_isa(int isa) {
    if (isa != LORA_OPS_ISA_AUTO && !machine_has(isa)) return LORA_OPS_UNSUPPORTED_ISA;
    forced_isa.store(isa, std::memory_order_relaxed);
    return LORA_OPS_OK;
}

const float* lora_ops_nf4_code(void) { return kNF4Code; }

int lora_ops_nf4_quantize(const void* w, int dtype, int64_t n, int64_t block_size, uint8_t* packed, float* absmax,
                          int n_threads) {
    if (n < 0 || block_size <= 0 || block_size % 32 || n_threads < 1 || !is_dtype(dtype)) return LORA_OPS_BAD_ARGUMENT;
    if (n == 0) return LORA_OPS_OK;
    if (!w || !packed || !absmax) return LORA_OPS_BAD_ARGUMENT;
    const Kernels& isa = kernels();
    std::atomic<bool> finite{true};
    parallel(0, n, block_size, n_threads, [&](int64_t begin, int64_t end) {
        const char* from = static_cast<const char*>(w) + begin * size_of(dtype);
        if (!isa.nf4_quantize(from, static_cast<lora_ops_dtype>(dtype), end - begin, block_size, packed + begin / 2,
                              absmax + begin / block_size)) {
            finite.store(false, std::memory_order_relaxed);
        }
    });
    return finite.load(std::memory_order_relaxed) ? LORA_OPS_OK : LORA_OPS_NONFINITE;
}

int lora_ops_nf4_quantize_transposed(const void* w, int dtype, int64_t n, int64_t k, int64_t block_size, uint8_t* packed,
                                     float* absmax, int n_threads) {
    if (n < 0 || k < 0 || block_size <= 0 || block_size % 32 || n_threads < 1) return LORA_OPS_BAD_ARGUMENT;
    if (!is_dtype(dtype)) return LORA_OPS_BAD_ARGUMENT;
    if (n == 0 || k == 0) return LORA_OPS_OK;
    if (!w || !packed || !absmax) return LORA_OPS_BAD_ARGUMENT;
    const Kernels& isa = kernels();
    // A block, the row that it ends in and those to the end of a line, and the rest of the row that it begins in.
    const int64_t rows = std::min(n, block_size / k + 64 / size_of(dtype) + 2);
    std::atomic<int> status{LORA_OPS_OK};
    parallel(0, n * k, block_size, n_threads, [&](int64_t begin, int64_t end) {
        char* const memory = thread_scratch(rows * k * size_of(dtype));
        if (!memory) {
            status.store(LORA_OPS_NO_MEMORY, std::memory_order_relaxed);
        } else if (!isa.nf4_quantize_transposed(w, static_cast<lora_ops_dtype>(dtype), n, k, begin, end, block_size, packed,
                                                absmax, memory)) {
            status.store(LORA_OPS_NONFINITE, std::memory_order_relaxed);
        }
    });
    return status.load(std::memory_order_relaxed);
}

int lora_ops_nf4_dequantize(const lora_ops_nf4_weight* w, int64_t begin, int64_t end, void* out, int dtype,
                            int n_threads) {
    if (!w || begin < 0 || end < begin || n_threads < 1 || !is_dtype(dtype)) return LORA_OPS_BAD_ARGUMENT;
    if (w->block_size <= 0 || w->block_size % 32) return LORA_OPS_BAD_ARGUMENT;
    if (begin == end) return LORA_OPS_OK;
    if (!out || !is_valid(w)) return LORA_OPS_BAD_ARGUMENT;
    const Kernels& isa = kernels();
    parallel(begin, end, w->block_size, n_threads, [&](int64_t from, int64_t to) {
        char* target = static_cast<char*>(out) + (from - begin) * size_of(dtype);
        isa.nf4_dequantize(*w, from, to, target, static_cast<lora_ops_dtype>(dtype));
    });
    return LORA_OPS_OK;
}

int lora_ops_nf4_dequantize_transposed(const lora_ops_nf4_weight* w, int64_t n, int64_t k, void* out, int dtype,
                                       int n_threads) {
    if (!w || n < 0 || k < 0 || n_threads < 1 || !is_dtype(dtype)) return LORA_OPS_BAD_ARGUMENT;
    if (w->block_size <= 0 || w->block_size % 32) return LORA_OPS_BAD_ARGUMENT;
    if (n == 0 || k == 0) return LORA_OPS_OK;
    if (!out || !is_valid(w)) return LORA_OPS_BAD_ARGUMENT;
    const Kernels& isa = kernels();
    const int64_t rows = kNF4TileBytes / size_of(dtype), elements = rows * kNF4TileColumns;
    const int64_t tiles = (n + rows - 1) / rows * ((k + kNF4TileColumns - 1) / kNF4TileColumns);
    parallel(0, tiles * elements, elements, n_threads, [&](int64_t from, int64_t to) {
        const auto type = static_cast<lora_ops_dtype>(dtype);
        isa.nf4_dequantize_transposed(*w, n, k, from / elements, to / elements, out, type);
    });
    return LORA_OPS_OK;
}

int lora_ops_nf4_linear(const lora_ops_nf4_weight* w, int64_t n, int64_t k, const void* x, int64_t m, int64_t stride_x,
                        const void* bias, void* y, int64_t stride_y, int dtype, int n_threads) {
    if (!w) return LORA_OPS_BAD_ARGUMENT;
    const auto type = static_cast<lora_ops_dtype>(dtype);
    return run_gemm({*w, n, k, x, m, stride_x, bias, y, stride_y, type, false, n, k}, n_threads);
}

int lora_ops_nf4_linear_dx(const lora_ops_nf4_weight* w, int64_t n, int64_t k, const void* dy, int64_t m,
                           int64_t stride_dy, void* dx, int64_t stride_dx, int dtype, int n_threads) {
    if (!w) return LORA_OPS_BAD_ARGUMENT;
    const auto type = static_cast<lora_ops_dtype>(dtype);
    return run_gemm({*w, n, k, dy, m, stride_dy, nullptr, dx, stride_dx, type, true, k, n}, n_threads);
}

int lora_ops_blockwise8_quantize(const float* x, int64_t n, int64_t block_size, const float* map, uint8_t* codes,
                                 float* absmax, int n_threads) try {
    if (n < 0 || block_size <= 0 || n_threads < 1) return LORA_OPS_BAD_ARGUMENT;
    if (n == 0) return LORA_OPS_OK;
    if (!x || !map || !codes || !absmax || !std::is_sorted(map, map + 256)) return LORA_OPS_BAD_ARGUMENT;
    const auto code = code_of(map);
    const Blockwise8Kernels& isa = blockwise8_kernels();
    std::atomic<bool> finite{true};
    parallel(0, n, block_size, n_threads, [&](int64_t begin, int64_t end) {
        if (!isa.quantize(x + begin, end - begin, block_size, *code, codes + begin, absmax + begin / block_size)) {
            finite.store(false, std::memory_order_relaxed);
        }
    });
    return finite.load(std::memory_order_relaxed) ? LORA_OPS_OK : LORA_OPS_NONFINITE;
} catch (const std::bad_alloc&) {
    return LORA_OPS_NO_MEMORY;
}

int lora_ops_blockwise8_dequantize(const uint8_t* codes, const float* absmax, int64_t n, int64_t block_size,
                                   const float* map, float* out, int n_threads) try {
    if (n < 0 || block_size <= 0 || n_threads < 1) return LORA_OPS_BAD_ARGUMENT;
    if (n == 0) return LORA_OPS_OK;
    if (!codes || !absmax || !map || !out) return LORA_OPS_BAD_ARGUMENT;
    const auto code = code_of(map);
    const Blockwise8Kernels& isa = blockwise8_kernels();
    parallel(0, n, block_size, n_threads, [&](int64_t begin, int64_t end) {
        isa.dequantize(codes + begin, absmax + begin / block_size, end - begin, block_size, *code, out + begin);
    });
    return LORA_OPS_OK;
} catch (const std::bad_alloc&) {
    return LORA_OPS_NO_MEMORY;
}

int lora_ops_adamw(const lora_ops_adamw_slice* slices, int64_t count, const float* constants, int64_t rows,
                   const float* signed_map, const float* unsigned_map, const uint64_t* seed, int n_threads) try {
    if (count < 0 || n_threads < 1) return LORA_OPS_BAD_ARGUMENT;
    if (count == 0) return LORA_OPS_OK;
    if (!slices || !constants || !signed_map || !unsigned_map) return LORA_OPS_BAD_ARGUMENT;
    if (!std::is_sorted(signed_map, signed_map + 256)) return LORA_OPS_BAD_ARGUMENT;
    if (!std::is_sorted(unsigned_map, unsigned_map + 256)) return LORA_OPS_BAD_ARGUMENT;
    const auto signed_code = code_of(signed_map), unsigned_code = code_of(unsigned_map);
    const AdamwCodes codes = {signed_code.get(), unsigned_code.get()};

    constexpr int64_t kBlock = 256;
    std::vector<int64_t> start(static_cast<size_t>(count) + 1);  // of each slice, in elements of whole blocks
    for (int64_t i = 0; i < count; ++i) {
        if (!is_valid(slices[i], rows)) return LORA_OPS_BAD_ARGUMENT;
        start[i + 1] = start[i] + (slices[i].n + kBlock - 1) / kBlock * kBlock;
    }
    const Blockwise8Kernels& isa = blockwise8_kernels();
    parallel(0, start[count], kBlock, n_threads, [&](int64_t begin, int64_t end) {
        int64_t i = std::upper_bound(start.begin(), start.end(), begin) - start.begin() - 1;
        for (; i < count && start[i] < end; ++i) {
            const int64_t from = std::max(begin - start[i], int64_t{0}), to = std::min(end - start[i], slices[i].n);
            if (from < to) isa.adamw(slices[i], from, to, constants + 8 * slices[i].row, codes, seed);
        }
    });
    return LORA_OPS_OK;
} catch (const std::bad_alloc&) {
    return LORA_OPS_NO_MEMORY;
}

int lora_ops_checksum(const void* bytes, int64_t n, uint64_t* checksum) {
    if (n < 0 || !checksum || (n && !bytes)) return LORA_OPS_BAD_ARGUMENT;
    Checksum sum;
    sum.add(bytes, n);
    *checksum = sum.value();
    return LORA_OPS_OK;
}
