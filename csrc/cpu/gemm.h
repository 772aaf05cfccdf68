// A product of activations and an NF4 weight, and how one instruction set cuts it into tasks.
#pragma once

#include <stdint.h>

#include "lora_ops.h"

namespace lora_ops {

// y [M, N] = x [M, K] Wᵀ + bias, or, when dx, dX [M, K] = dY [M, N] W. W [N, K] stays packed.
// a is x or dY, out is y or dX; both have rows of their own stride and columns that follow each other.
struct Nf4Gemm {
    lora_ops_nf4_weight w;
    int64_t n, k;
    const void* a;
    int64_t m, stride_a;
    const void* bias;  // [N] in a's dtype, or NULL; never with dx
    void* out;
    int64_t stride_out;
    lora_ops_dtype dtype;  // of a, bias and out
    bool dx;
    int64_t columns;  // of out: N, or K with dx
    int64_t depth;    // terms of each sum: K, or N with dx
};

// Tasks write disjoint parts of out and may run in any order, on any thread. Which terms are added to which, and in
// which order, depends on the shape alone: results do not change with the number of threads.
struct Nf4GemmPlan {
    int64_t tasks;
    int64_t task_rows;      // of out; the rest of a task's extent is up to the kernel
    int64_t scratch_bytes;  // of each thread
    int64_t shared_bytes;   // that prepare writes and all tasks read
    bool dot;               // the kernel for a few rows
};

struct Nf4GemmKernels {
    Nf4GemmPlan (*plan)(const Nf4Gemm& g, int n_threads);
    void (*prepare)(const Nf4Gemm& g, const Nf4GemmPlan& plan, char* shared);  // once, before the tasks; or NULL
    void (*task)(const Nf4Gemm& g, const Nf4GemmPlan& plan, int64_t task, const char* shared, char* scratch);
};

extern const Nf4GemmKernels kPortableGemm;
extern const Nf4GemmKernels kAvx2Gemm;
extern const Nf4GemmKernels kAvx512Gemm;
extern const Nf4GemmKernels kAvx512Bf16Gemm;

}  // namespace lora_ops
