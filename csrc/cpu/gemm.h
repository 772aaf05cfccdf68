// A product of activations and a frozen weight, and how one instruction set cuts it into tasks.
#pragma once

#include <stdint.h>

#include "lora_ops.h"

namespace lora_ops {

// What a low-rank update adds to a product before its one rounding, where the bits say so.
struct LowRank {
    const void* left;  // [m, rank] in the product's dtype, with zeros up to a multiple of 32
    int64_t stride_left, rank;
    const void* right;  // y: B [N, rank]; dX: A [rank, K]; contiguous
    int right_dtype;
    const uint8_t* bits;  // rows of stride_bits bytes, for multiples of 64 columns, the lowest bit first; or NULL: all
    int64_t stride_bits;
};

// y [M, N] = x [M, K] Wᵀ + bias, or, when dx, dX [M, K] = dY [M, N] W. W [N, K] stays as it is.
// a is x or dY, out is y or dX; both have rows of their own stride and columns that follow each other.
struct Gemm {
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
    const void* dense = nullptr;  // W in a's dtype, in the place of w; where GemmKernels::fuses
    int64_t stride_dense = 0;
    const LowRank* low_rank = nullptr;  // likewise
};

// Tasks write disjoint parts of out and may run in any order, on any thread. Which terms are added to which, and in
// which order, depends on the shape alone: results do not change with the number of threads.
struct GemmPlan {
    int64_t tasks;
    int64_t task_rows;      // of out; the rest of a task's extent is up to the kernel
    int64_t scratch_bytes;  // of each thread
    int64_t shared_bytes;   // that prepare writes and all tasks read
    bool dot;               // the kernel for a few rows
};

struct GemmKernels {
    GemmPlan (*plan)(const Gemm& g, int n_threads);
    void (*prepare)(const Gemm& g, const GemmPlan& plan, char* shared);  // once, before the tasks; or NULL
    void (*task)(const Gemm& g, const GemmPlan& plan, int64_t task, const char* shared, char* scratch);
    bool (*fuses)(const Gemm& g) = nullptr;  // whether it may have a dense weight and a low-rank update; or NULL: never
};

// Runs it on the instruction set in use; a lora_ops_status.
int run_gemm(const Gemm& g, int n_threads);

// Whether the instruction set in use can do this product with a dense weight or a low-rank update.
bool gemm_fuses(const Gemm& g);

extern const GemmKernels kPortableGemm;
extern const GemmKernels kAvx2Gemm;
extern const GemmKernels kAvx512Gemm;
extern const GemmKernels kAvx512Bf16Gemm;

}  // namespace lora_ops
