// The C ABI of lora_linear's low-rank part: checks arguments and picks the instruction set.
#include "lora.h"

#include "gemm.h"

#include <string.h>

#include <algorithm>
#include <memory>
#include <new>

#if defined(LORA_OPS_X86)
#include <cpuid.h>
#endif

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

// oneDNN multiplies dense bfloat16 in AMX tiles, many times as fast as anything here.
bool has_amx() {
#if defined(LORA_OPS_X86)
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1);
#else
    return false;
#endif
}

Gemm base_product(const lora_ops_adapter& adapter, const lora_ops_weight& weight, const void* a, int64_t m,
                  int64_t stride_a, void* out, int64_t stride_out, int dtype, bool dx) {
    Gemm g = {};
    g.w = weight.nf4;
    g.dense = weight.dense;
    g.stride_dense = weight.stride;
    g.n = adapter.n;
    g.k = adapter.k;
    g.a = a;
    g.m = m;
    g.stride_a = stride_a;
    g.out = out;
    g.stride_out = stride_out;
    g.dtype = static_cast<lora_ops_dtype>(dtype);
    g.dx = dx;
    g.columns = dx ? adapter.k : adapter.n;
    g.depth = dx ? adapter.n : adapter.k;
    return g;
}

// Of left in 16 bits.
size_t left_bytes(const lora_ops_adapter& adapter, int64_t m) {
    return static_cast<size_t>(m * left_stride(adapter.r) * 2 + 63) / 64 * 64;
}

}  // namespace

void* lora_workspace(size_t bytes, int slot) {
    static constexpr std::align_val_t kAlign{64};
    struct Free {
        void operator()(char* p) const { operator delete[](p, kAlign); }
    };
    struct Memory {
        std::unique_ptr<char[], Free> bytes;
        size_t size = 0;
    };
    thread_local Memory slots[2];
    Memory& memory = slots[slot];
    if (memory.size < bytes) {
        memory = {};
        memory.bytes.reset(new (kAlign, std::nothrow) char[bytes]);
        if (memory.bytes) memory.size = bytes;
    }
    return memory.bytes.get();
}

}  // namespace lora_ops

using namespace lora_ops;

int lora_ops_takes_dense(int dtype) {
    return dtype == LORA_OPS_BF16 && lora_ops_get_isa() == LORA_OPS_ISA_AVX512_BF16 && !has_amx();
}

int lora_ops_lora_forward(const lora_ops_adapter* adapter, const lora_ops_weight* weight, const void* bias,
                          const void* x, int64_t m, int64_t stride_x, float* s, void* y, int64_t stride_y, int dtype,
                          int n_threads) {
    if (!is_valid(adapter) || m < 0 || !is_dtype(dtype) || n_threads < 1) return LORA_OPS_BAD_ARGUMENT;
    if (m == 0) return LORA_OPS_OK;
    if (!x || !s || !y) return LORA_OPS_BAD_ARGUMENT;
    const int threads = useful_threads(*adapter, m, n_threads);
    LoraForward f = {*adapter, m, dtype, x, stride_x, s, y, stride_y, threads, nullptr};
    if (!weight) return kernels().forward(f);
    Gemm g = base_product(*adapter, *weight, x, m, stride_x, y, stride_y, dtype, false);
    g.bias = bias;
    if (!gemm_fuses(g)) {
        const int status = run_gemm(g, n_threads);
        return status == LORA_OPS_OK ? kernels().forward(f) : status;
    }
    LowRank low = {};
    low.left = f.left = lora_workspace(left_bytes(*adapter, m), 1);
    if (!f.left) return LORA_OPS_NO_MEMORY;
    const int status = kernels().forward(f);
    if (status != LORA_OPS_OK) return status;
    low.stride_left = left_stride(adapter->r);
    low.rank = adapter->r;
    low.right = adapter->b;
    low.right_dtype = adapter->b_dtype;
    g.low_rank = &low;
    return run_gemm(g, n_threads);
}

int lora_ops_lora_backward(const lora_ops_adapter* adapter, const lora_ops_weight* weight, const void* dy, int64_t m,
                           int64_t stride_dy, const void* x, int64_t stride_x, const float* s, void* dx,
                           int64_t stride_dx, void* da, void* db, void* dbias, int dtype, int n_threads) {
    if (!is_valid(adapter) || m < 0 || !is_dtype(dtype) || n_threads < 1) return LORA_OPS_BAD_ARGUMENT;
    if (m > 0 && (!dy || (da && !x) || (db && !s))) return LORA_OPS_BAD_ARGUMENT;
    if (m == 0) {
        if (da) memset(da, 0, static_cast<size_t>(adapter->r * adapter->k) * size_of(adapter->a_dtype));
        if (db) memset(db, 0, static_cast<size_t>(adapter->n * adapter->r) * size_of(adapter->b_dtype));
        if (dbias) memset(dbias, 0, static_cast<size_t>(adapter->n) * size_of(dtype));
        return LORA_OPS_OK;
    }
    const int threads = useful_threads(*adapter, m, n_threads);
    LoraBackward b = {*adapter, m,  dtype, dy, stride_dy, x,       stride_x, s, dx, stride_dx,
                      da,       db, dbias, threads,       nullptr, nullptr,  0};
    if (!weight || !dx) return kernels().backward(b);
    Gemm g = base_product(*adapter, *weight, dy, m, stride_dy, dx, stride_dx, dtype, true);
    if (!gemm_fuses(g)) {
        const int status = run_gemm(g, n_threads);
        return status == LORA_OPS_OK ? kernels().backward(b) : status;
    }
    b.bits_stride = adapter->threshold ? (adapter->k + 63) / 64 * 8 : 0;
    const size_t bits_bytes = static_cast<size_t>(m * b.bits_stride);
    char* const memory = static_cast<char*>(lora_workspace(left_bytes(*adapter, m) + bits_bytes, 1));
    if (!memory) return LORA_OPS_NO_MEMORY;
    b.left = memory;
    b.bits = bits_bytes ? reinterpret_cast<uint8_t*>(memory + left_bytes(*adapter, m)) : nullptr;
    const int status = kernels().backward(b);
    if (status != LORA_OPS_OK) return status;
    const LowRank low = {memory, left_stride(adapter->r), adapter->r,    adapter->a, adapter->a_dtype,
                         b.bits, b.bits_stride};
    g.low_rank = &low;
    return run_gemm(g, n_threads);
}

int lora_ops_dropout_mask(uint64_t seed, uint32_t offset, uint32_t threshold, int64_t first_row, int64_t rows,
                          int64_t k, uint8_t* bits) {
    if (threshold > 65536 || first_row < 0 || rows < 0 || k < 0) return LORA_OPS_BAD_ARGUMENT;
    if (rows == 0 || k == 0) return LORA_OPS_OK;
    if (!bits) return LORA_OPS_BAD_ARGUMENT;
    kernels().dropout_mask(seed, offset, threshold, first_row, rows, k, bits);
    return LORA_OPS_OK;
}
