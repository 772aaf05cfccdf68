/* The C ABI of the CUDA kernels (csrc/cuda): raw pointers to device memory, sizes and a stream; no torch and no Python
 * headers. Functions launch on the current device and return at once, with LORA_OPS_OK, LORA_OPS_BAD_ARGUMENT, or
 * LORA_OPS_CUDA_ERROR + the cudaError_t of the launch. */
#ifndef LORA_OPS_CUDA_H
#define LORA_OPS_CUDA_H

#include "lora_ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Raised with every change that an older caller would not survive; lora_ops/runtime/cuda.py holds the same number. */
#define LORA_OPS_CUDA_ABI_VERSION 1
#define LORA_OPS_CUDA_ERROR 1000

/* lora_ops_nf4_weight in device memory; the offset is read there too. absmax, or the four below it. */
typedef struct {
    const uint8_t* packed;
    const float* absmax;
    const uint8_t* absmax_codes;
    const float* absmax_map;
    const float* nested_absmax;
    const float* nested_offset;
    int64_t block_size; /* a power of two, at least 32 */
} lora_ops_cuda_nf4_weight;

LORA_OPS_API int lora_ops_cuda_abi_version(void);

/* y [m, n] = x [m, k] Wᵀ + bias with W [n, k]; sums in fp32, in one fixed order. x, y and bias [n] (or NULL) are of dtype
 * F16 or BF16; rows of x are stride_x elements apart, y is contiguous. Fast where k is a multiple of 64, blocks have at
 * least 64 elements, and packed, x and its rows lie on 16 bytes; right for any n and k. Made for m <= 64. */
LORA_OPS_API int lora_ops_cuda_nf4_linear(const lora_ops_cuda_nf4_weight* w, int64_t n, int64_t k, const void* x,
                                          int64_t m, int64_t stride_x, const void* bias, void* y, int dtype,
                                          void* stream);

#ifdef __cplusplus
}
#endif

#endif
