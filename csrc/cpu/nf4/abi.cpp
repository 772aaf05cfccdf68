// The C ABI of the NF4 codec: checks arguments and splits the work over threads.
#include <algorithm>
#include <atomic>

#include "common/arguments.h"
#include "common/threads.h"
#include "isa/isa.h"
#include "nf4/nf4.h"
#include "nf4/table.h"

namespace lora_ops {
namespace {

const NF4Kernels& kernels() { return for_current_isa<kPortableNF4, kAvx2NF4, kAvx512NF4, kAvx512NF4, kNeonNF4, kNeonNF4>(); }

}  // namespace
}  // namespace lora_ops

using namespace lora_ops;

const float* lora_ops_nf4_code(void) { return kNF4Code; }

int lora_ops_nf4_quantize(const void* w, int dtype, int64_t n, int64_t block_size, uint8_t* packed, float* absmax,
                          int n_threads) {
    if (n < 0 || block_size <= 0 || block_size % 32 || n_threads < 1 || !is_dtype(dtype)) return LORA_OPS_BAD_ARGUMENT;
    if (n == 0) return LORA_OPS_OK;
    if (!w || !packed || !absmax) return LORA_OPS_BAD_ARGUMENT;
    const NF4Kernels& isa = kernels();
    std::atomic<bool> finite{true};
    parallel(0, n, block_size, n_threads, [&](int64_t begin, int64_t end) {
        const char* from = static_cast<const char*>(w) + begin * size_of(dtype);
        if (!isa.quantize(from, static_cast<lora_ops_dtype>(dtype), end - begin, block_size, packed + begin / 2,
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
    const NF4Kernels& isa = kernels();
    // A block, the row that it ends in and those to the end of a line, and the rest of the row that it begins in.
    const int64_t rows = std::min(n, block_size / k + 64 / size_of(dtype) + 2);
    std::atomic<int> status{LORA_OPS_OK};
    parallel(0, n * k, block_size, n_threads, [&](int64_t begin, int64_t end) {
        char* const memory = thread_memory(Use::kTask, rows * k * size_of(dtype));
        if (!memory) {
            status.store(LORA_OPS_NO_MEMORY, std::memory_order_relaxed);
        } else if (!isa.quantize_transposed(w, static_cast<lora_ops_dtype>(dtype), n, k, begin, end, block_size, packed,
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
    const NF4Kernels& isa = kernels();
    parallel(begin, end, w->block_size, n_threads, [&](int64_t from, int64_t to) {
        char* target = static_cast<char*>(out) + (from - begin) * size_of(dtype);
        isa.dequantize(*w, from, to, target, static_cast<lora_ops_dtype>(dtype));
    });
    return LORA_OPS_OK;
}

int lora_ops_nf4_dequantize_transposed(const lora_ops_nf4_weight* w, int64_t n, int64_t k, void* out, int dtype,
                                       int n_threads) {
    if (!w || n < 0 || k < 0 || n_threads < 1 || !is_dtype(dtype)) return LORA_OPS_BAD_ARGUMENT;
    if (w->block_size <= 0 || w->block_size % 32) return LORA_OPS_BAD_ARGUMENT;
    if (n == 0 || k == 0) return LORA_OPS_OK;
    if (!out || !is_valid(w)) return LORA_OPS_BAD_ARGUMENT;
    const NF4Kernels& isa = kernels();
    const int64_t rows = kNF4TileBytes / size_of(dtype), elements = rows * kNF4TileColumns;
    const int64_t tiles = (n + rows - 1) / rows * ((k + kNF4TileColumns - 1) / kNF4TileColumns);
    parallel(0, tiles * elements, elements, n_threads, [&](int64_t from, int64_t to) {
        const auto type = static_cast<lora_ops_dtype>(dtype);
        isa.dequantize_transposed(*w, n, k, from / elements, to / elements, out, type);
    });
    return LORA_OPS_OK;
}
