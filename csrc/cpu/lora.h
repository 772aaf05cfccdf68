// The low-rank part of lora_linear: what each instruction set provides. lora.cpp checks arguments and picks a set.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "lora_ops.h"

namespace lora_ops {

// One call of lora_ops_lora_forward; the names are those of its arguments. With left, scale s goes there, in dtype, and y
// is left alone.
struct LoraForward {
    const lora_ops_adapter& adapter;
    int64_t m;
    int dtype;
    const void* x;
    int64_t x_stride;
    float* s;
    void* y;
    int64_t y_stride;
    int n_threads;
    void* left;  // [m, left_stride(r)]
};

// One call of lora_ops_lora_backward; a null output is not computed. With left, ds goes there, in dtype, and the mask to
// bits, and dx is left alone.
struct LoraBackward {
    const lora_ops_adapter& adapter;
    int64_t m;
    int dtype;
    const void* dy;
    int64_t dy_stride;
    const void* x;
    int64_t x_stride;
    const float* s;
    void* dx;
    int64_t dx_stride;
    void* da;
    void* db;
    void* dbias;
    int n_threads;
    void* left;     // [m, left_stride(r)]
    uint8_t* bits;  // [m, bits_stride], if there is a mask
    int64_t bits_stride;
};

// Elements between rows of left, of which those from r on are zero.
constexpr int64_t left_stride(int64_t r) { return (r + 31) / 32 * 32; }

// forward and backward return a lora_ops_status.
struct LoraKernels {
    int (*forward)(const LoraForward& call);
    int (*backward)(const LoraBackward& call);
    void (*dropout_mask)(uint64_t seed, uint32_t offset, uint32_t threshold, int64_t first_row, int64_t rows,
                         int64_t k, uint8_t* bits);
};

extern const LoraKernels kPortableLora;
extern const LoraKernels kAvx2Lora;
extern const LoraKernels kAvx512Lora;
extern const LoraKernels kAvx512Bf16Lora;

// `bytes` of 64-byte aligned memory that lives as long as the calling thread and is reused by its next call with this
// slot, of two. Fresh memory would be page-faulted in on every call, which costs as much as the kernels. Null if there is
// no memory.
void* lora_workspace(size_t bytes, int slot = 0);

}  // namespace lora_ops
