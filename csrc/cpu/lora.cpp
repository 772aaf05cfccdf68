// The C ABI of lora_linear's low-rank part: checks arguments and picks the instruction set.
#include "lora.h"

#include <string.h>

#include <algorithm>
#include <memory>
#include <new>

namespace lora_ops {
namespace {

const LoraKernels& kernels() {
#if defined(LORA_OPS_X86)
    switch (lora_ops_get_isa()) {
        case LORA_OPS_ISA_AVX2: return kAvx2Lora;
        case LORA_OPS_ISA_AVX512: return kAvx512Lora;
        case LORA_OPS_ISA_AVX512_BF16: return kAvx512Bf16Lora;
    }
#endif
    return kPortableLora;
}

bool is_dtype(int dtype) { return dtype == LORA_OPS_F32 || dtype == LORA_OPS_F16 || dtype == LORA_OPS_BF16; }
size_t size_of(int dtype) { return dtype == LORA_OPS_F32 ? 4 : 2; }

bool is_valid(const lora_ops_adapter* adapter) {
    return adapter && adapter->a && adapter->b && is_dtype(adapter->a_dtype) && is_dtype(adapter->b_dtype) &&
           adapter->n > 0 && adapter->k > 0 && adapter->r > 0 && adapter->threshold <= 65536;
}

// Below this many multiply-adds a second thread costs more than it saves.
constexpr double kWorkPerThread = 1 << 15;

int useful_threads(const lora_ops_adapter& adapter, int64_t m, int n_threads) {
    const double columns = static_cast<double>(adapter.n) + static_cast<double>(adapter.k);
    const double work = static_cast<double>(m) * static_cast<double>(adapter.r) * columns;
    return static_cast<int>(std::max(1.0, std::min(static_cast<double>(n_threads), work / kWorkPerThread)));
}

}  // namespace

void* lora_workspace(size_t bytes) {
    constexpr std::align_val_t kAlign{64};
    struct Free {
        void operator()(char* p) const { operator delete[](p, kAlign); }
    };
    thread_local std::unique_ptr<char[], Free> memory;
    thread_local size_t size = 0;
    if (size < bytes) {
        size = 0;
        memory.reset();
        memory.reset(new (kAlign, std::nothrow) char[bytes]);
        if (memory) size = bytes;
    }
    return memory.get();
}

}  // namespace lora_ops

using namespace lora_ops;

int lora_ops_lora_forward(const lora_ops_adapter* adapter, const void* x, int64_t m, int64_t stride_x, float* s,
                          void* y, int64_t stride_y, int dtype, int n_threads) {
    if (!is_valid(adapter) || m < 0 || !is_dtype(dtype) || n_threads < 1) return LORA_OPS_BAD_ARGUMENT;
    if (m == 0) return LORA_OPS_OK;
    if (!x || !s || !y) return LORA_OPS_BAD_ARGUMENT;
    const int threads = useful_threads(*adapter, m, n_threads);
    return kernels().forward({*adapter, m, dtype, x, stride_x, s, y, stride_y, threads});
}

int lora_ops_lora_backward(const lora_ops_adapter* adapter, const void* dy, int64_t m, int64_t stride_dy,
                           const void* x, int64_t stride_x, const float* s, void* dx, int64_t stride_dx, void* da,
                           void* db, void* dbias, int dtype, int n_threads) {
    if (!is_valid(adapter) || m < 0 || !is_dtype(dtype) || n_threads < 1) return LORA_OPS_BAD_ARGUMENT;
    if (m > 0 && (!dy || (da && !x) || (db && !s))) return LORA_OPS_BAD_ARGUMENT;
    if (m == 0) {
        if (da) memset(da, 0, static_cast<size_t>(adapter->r * adapter->k) * size_of(adapter->a_dtype));
        if (db) memset(db, 0, static_cast<size_t>(adapter->n * adapter->r) * size_of(adapter->b_dtype));
        if (dbias) memset(dbias, 0, static_cast<size_t>(adapter->n) * size_of(dtype));
        return LORA_OPS_OK;
    }
    const int threads = useful_threads(*adapter, m, n_threads);
    return kernels().backward(
        {*adapter, m, dtype, dy, stride_dy, x, stride_x, s, dx, stride_dx, da, db, dbias, threads});
}

int lora_ops_dropout_mask(uint64_t seed, uint32_t offset, uint32_t threshold, int64_t first_row, int64_t rows,
                          int64_t k, uint8_t* bits) {
    if (threshold > 65536 || first_row < 0 || rows < 0 || k < 0) return LORA_OPS_BAD_ARGUMENT;
    if (rows == 0 || k == 0) return LORA_OPS_OK;
    if (!bits) return LORA_OPS_BAD_ARGUMENT;
    kernels().dropout_mask(seed, offset, threshold, first_row, rows, k, bits);
    return LORA_OPS_OK;
}
