// The C ABI of products with a frozen weight, dense or NF4.
#include "gemm/gemm.h"
#include "isa/isa.h"

#if defined(LORA_OPS_X86)
#include <cpuid.h>
#endif

namespace lora_ops {
namespace {

// Whether torch multiplies a dense weight at the speed of the machine: bfloat16 on AVX-512 with AMX tiles and float16 with
// AVX-512 FP16. Without, it has no kernels for float16 and, below AVX-512, none for bfloat16: dY W takes 100 times as long
// as in float32. Its float32 is slower too: 1.2 times as slow on AVX2, and on AVX-512 twice where its BLAS keeps to AVX2.
bool torch_is_fast([[maybe_unused]] int dtype) {
#if defined(LORA_OPS_X86)
    if (dtype == LORA_OPS_F32) return false;
    unsigned eax, ebx, ecx, edx = 0;
    __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
    constexpr unsigned kAmxBf16 = 1u << 22, kAvx512Fp16 = 1u << 23;
    return edx & (dtype == LORA_OPS_BF16 ? kAmxBf16 : kAvx512Fp16);
#else
    return true;  // not known
#endif
}

}  // namespace
}  // namespace lora_ops

using namespace lora_ops;

int lora_ops_takes_dense(int dtype) {
    return current_isa() != LORA_OPS_ISA_PORTABLE && !torch_is_fast(dtype);
}

int lora_ops_linear(const lora_ops_weight* weight, int64_t n, int64_t k, const void* x, int64_t m, int64_t stride_x,
                    const void* bias, void* y, int64_t stride_y, int dtype, int n_threads) {
    if (!weight) return LORA_OPS_BAD_ARGUMENT;
    return run_gemm(product_y(*weight, n, k, x, m, stride_x, bias, y, stride_y, dtype), n_threads);
}

int lora_ops_linear_dx(const lora_ops_weight* weight, int64_t n, int64_t k, const void* dy, int64_t m,
                       int64_t stride_dy, void* dx, int64_t stride_dx, int dtype, int n_threads) {
    if (!weight) return LORA_OPS_BAD_ARGUMENT;
    return run_gemm(product_dx(*weight, n, k, dy, m, stride_dy, dx, stride_dx, dtype), n_threads);
}
