// The C ABI of lora_linear: checks arguments, and has the low-rank update ride the product with W where that fuses.
#include <string.h>

#include <algorithm>

#include "common/arguments.h"
#include "common/threads.h"
#include "gemm/gemm.h"
#include "isa/isa.h"
#include "lora/lora.h"

namespace lora_ops {
namespace {

const LoraKernels& kernels() {
    return for_current_isa<kPortableLora, kAvx2Lora, kAvx512Lora, kAvx512Bf16Lora, kNeonLora, kNeonLora>();
}

bool is_valid(const lora_ops_adapter* adapter) {
    return adapter && adapter->lora_a && adapter->lora_b && is_dtype(adapter->lora_a_dtype) &&
           is_dtype(adapter->lora_b_dtype) && adapter->n > 0 && adapter->k > 0 && adapter->r > 0 &&
           adapter->threshold <= 65536;
}

// Below this many multiply-adds a second thread costs more than it saves: to wake one takes 5 to 50 µs.
constexpr double kWorkPerThread = 1 << 15, kWorkPerThreadOfS = 1 << 18;

int useful_threads(double work, double work_per_thread, int n_threads) {
    return static_cast<int>(std::max(1.0, std::min(static_cast<double>(n_threads), work / work_per_thread)));
}

int useful_threads(const lora_ops_adapter& adapter, int64_t m, int n_threads) {
    const double columns = static_cast<double>(adapter.n) + static_cast<double>(adapter.k);
    return useful_threads(static_cast<double>(m) * static_cast<double>(adapter.r) * columns, kWorkPerThread, n_threads);
}

// Of S alone.
int useful_threads_of_s(const lora_ops_adapter& adapter, int64_t m, int n_threads) {
    const double work = static_cast<double>(m) * static_cast<double>(adapter.r) * static_cast<double>(adapter.k);
    return useful_threads(work, kWorkPerThreadOfS, n_threads);
}

// Of scale S, or of dS, in 16 bits.
int64_t bytes_of_s(const lora_ops_adapter& adapter, int64_t m) {
    return (m * padded_rank(adapter.r) * 2 + 63) / 64 * 64;
}

}  // namespace
}  // namespace lora_ops

using namespace lora_ops;

int lora_ops_lora_forward(const lora_ops_adapter* adapter, const lora_ops_weight* weight, const void* bias,
                          const void* x, int64_t m, int64_t stride_x, float* s, void* y, int64_t stride_y, int dtype,
                          int n_threads) {
    if (!is_valid(adapter) || m < 0 || !is_dtype(dtype) || n_threads < 1) return LORA_OPS_BAD_ARGUMENT;
    if (m == 0) return LORA_OPS_OK;
    if (!x || !s || !y) return LORA_OPS_BAD_ARGUMENT;
    const int threads = useful_threads(*adapter, m, n_threads);
    LoraForward f = {*adapter, m, dtype, x, stride_x, s, y, stride_y, threads, nullptr};
    if (!weight) return kernels().forward(f);
    Gemm g = product_y(*weight, adapter->n, adapter->k, x, m, stride_x, bias, y, stride_y, dtype);
    if (!gemm_fuses(g)) {
        const int status = run_gemm(g, n_threads);
        return status == LORA_OPS_OK ? kernels().forward(f) : status;
    }
    f.scaled_s = thread_memory(Use::kLowRank, bytes_of_s(*adapter, m));
    if (!f.scaled_s) return LORA_OPS_NO_MEMORY;
    f.n_threads = useful_threads_of_s(*adapter, m, n_threads);
    const int status = kernels().forward(f);
    if (status != LORA_OPS_OK) return status;
    const LowRank low = {f.scaled_s, padded_rank(adapter->r), adapter->r, adapter->lora_b, adapter->lora_b_dtype,
                         nullptr,    0};
    g.low_rank = &low;
    return run_gemm(g, n_threads);
}

int lora_ops_lora_backward(const lora_ops_adapter* adapter, const lora_ops_weight* weight, const void* dy, int64_t m,
                           int64_t stride_dy, const void* x, int64_t stride_x, const float* s, void* dx,
                           int64_t stride_dx, void* dlora_a, void* dlora_b, void* dbias, int dtype, int n_threads) {
    if (!is_valid(adapter) || m < 0 || !is_dtype(dtype) || n_threads < 1) return LORA_OPS_BAD_ARGUMENT;
    if (m > 0 && (!dy || (dlora_a && !x) || (dlora_b && !s))) return LORA_OPS_BAD_ARGUMENT;
    if (m == 0) {
        const auto clear = [](void* p, int64_t n, int type) {
            if (p) memset(p, 0, static_cast<size_t>(n * size_of(type)));
        };
        clear(dlora_a, adapter->r * adapter->k, adapter->lora_a_dtype);
        clear(dlora_b, adapter->n * adapter->r, adapter->lora_b_dtype);
        clear(dbias, adapter->n, dtype);
        return LORA_OPS_OK;
    }
    const int threads = useful_threads(*adapter, m, n_threads);
    LoraBackward b = {*adapter, m,         dtype,   dy,      stride_dy, x,       stride_x, s,
                      dx,       stride_dx, dlora_a, dlora_b, dbias,     threads, nullptr,  nullptr, 0};
    if (!weight || !dx) return kernels().backward(b);
    Gemm g = product_dx(*weight, adapter->n, adapter->k, dy, m, stride_dy, dx, stride_dx, dtype);
    if (!gemm_fuses(g)) {
        const int status = run_gemm(g, n_threads);
        return status == LORA_OPS_OK ? kernels().backward(b) : status;
    }
    b.stride_mask = adapter->threshold ? (adapter->k + 63) / 64 * 8 : 0;
    const int64_t ds_bytes = bytes_of_s(*adapter, m), mask_bytes = m * b.stride_mask;
    char* const memory = thread_memory(Use::kLowRank, ds_bytes + mask_bytes);
    if (!memory) return LORA_OPS_NO_MEMORY;
    b.ds = memory;
    b.mask = mask_bytes ? reinterpret_cast<uint8_t*>(memory + ds_bytes) : nullptr;
    const int status = kernels().backward(b);
    if (status != LORA_OPS_OK) return status;
    const LowRank low = {b.ds,   padded_rank(adapter->r), adapter->r, adapter->lora_a, adapter->lora_a_dtype,
                         b.mask, b.stride_mask};
    g.low_rank = &low;
    return run_gemm(g, n_threads);
}
