// The C ABI of 8-bit blockwise codes: checks arguments and splits the work over threads.
#include <algorithm>
#include <atomic>
#include <new>

#include "blockwise8/blockwise8.h"
#include "common/threads.h"
#include "isa/isa.h"
#include "lora_ops.h"

namespace lora_ops {
namespace {

const Blockwise8Kernels& kernels() {
    return for_current_isa<kPortableBlockwise8, kAvx2Blockwise8, kAvx512Blockwise8, kAvx512Bf16Blockwise8,
                           kNeonBlockwise8, kNeonBlockwise8>();
}

}  // namespace
}  // namespace lora_ops

using namespace lora_ops;

int lora_ops_blockwise8_quantize(const float* x, int64_t n, int64_t block_size, const float* map, uint8_t* codes,
                                 float* absmax, int n_threads) try {
    if (n < 0 || block_size <= 0 || n_threads < 1) return LORA_OPS_BAD_ARGUMENT;
    if (n == 0) return LORA_OPS_OK;
    if (!x || !map || !codes || !absmax || !std::is_sorted(map, map + 256)) return LORA_OPS_BAD_ARGUMENT;
    const auto code = code_of(map);
    const Blockwise8Kernels& isa = kernels();
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
    const Blockwise8Kernels& isa = kernels();
    parallel(0, n, block_size, n_threads, [&](int64_t begin, int64_t end) {
        isa.dequantize(codes + begin, absmax + begin / block_size, end - begin, block_size, *code, out + begin);
    });
    return LORA_OPS_OK;
} catch (const std::bad_alloc&) {
    return LORA_OPS_NO_MEMORY;
}
