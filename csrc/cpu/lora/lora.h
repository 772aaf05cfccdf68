// The low-rank part of lora_linear: what each instruction set provides. abi.cpp checks arguments.
#pragma once

#include <stdint.h>

#include "lora_ops.h"

namespace lora_ops {

// One call of lora_ops_lora_forward; the names are those of its arguments. With scaled_s, scale s goes there, in dtype,
// and y is left alone.
struct LoraForward {
    const lora_ops_adapter& adapter;
    int64_t m;
    int dtype;
    const void* x;
    int64_t stride_x;
    float* s;
    void* y;
    int64_t stride_y;
    int n_threads;
    void* scaled_s;  // [m, padded_rank(r)]
};

// One call of lora_ops_lora_backward; a null output is not computed. With ds, ds goes there, in dtype, and the mask to
// mask, and dx is left alone.
struct LoraBackward {
    const lora_ops_adapter& adapter;
    int64_t m;
    int dtype;
    const void* dy;
    int64_t stride_dy;
    const void* x;
    int64_t stride_x;
    const float* s;
    void* dx;
    int64_t stride_dx;
    void* dlora_a;
    void* dlora_b;
    void* dbias;
    int n_threads;
    void* ds;       // [m, padded_rank(r)]
    uint8_t* mask;  // [m, stride_mask] bytes, if there is dropout
    int64_t stride_mask;
};

// Elements between rows of scaled_s and of ds, of which those from r on are zero.
constexpr int64_t padded_rank(int64_t r) { return (r + 31) / 32 * 32; }

// Both return a lora_ops_status.
struct LoraKernels {
    int (*forward)(const LoraForward& call);
    int (*backward)(const LoraBackward& call);
};

extern const LoraKernels kPortableLora, kAvx2Lora, kAvx512Lora, kAvx512Bf16Lora, kNeonLora;

}  // namespace lora_ops
