// The C ABI of products with an NF4 weight.
#include "gemm/gemm.h"

using namespace lora_ops;

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
