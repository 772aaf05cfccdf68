// A product of activations and a frozen weight, and the routes by which it can be computed.
#pragma once

#include <stdint.h>

#include "lora_ops.h"

namespace lora_ops {

// What a low-rank update adds to a product before its one rounding, where the mask says so.
struct LowRank {
    const void* s;  // scale S, or dS with dx: [m, r] in the product's dtype, with zeros up to a multiple of 32
    int64_t stride_s, r;
    const void* factor;  // lora_b [N, r], or lora_a [r, K] with dx; contiguous
    int factor_dtype;
    const uint8_t* mask;  // rows of stride_mask bytes, for multiples of 64 columns, the lowest bit first; or NULL: all
    int64_t stride_mask;
};

// y [M, N] = x [M, K] Wᵀ + bias, or, when dx, dX [M, K] = dY [M, N] W: x is dY then and y is dX. W [N, K] stays as it is.
// x and y have rows of their own stride and columns that follow each other.
struct Gemm {
    lora_ops_nf4_weight w;
    int64_t n, k;
    const void* x;
    int64_t m, stride_x;
    const void* bias;  // [N] in x's dtype, or NULL; never with dx
    void* y;
    int64_t stride_y;
    lora_ops_dtype dtype;  // of x, bias and y
    bool dx;
    int64_t columns;  // of y: N, or K with dx
    int64_t depth;    // terms of each sum: K, or N with dx
    const void* dense = nullptr;        // W in x's dtype, in the place of w
    int64_t stride_dense = 0;           // between its rows
    bool transposed = false;            // dense is Wᵀ [K, N]; never of an NF4 weight
    const LowRank* low_rank = nullptr;  // where the route fuses

    // Whether a column of y is a row of the weight as it lies in memory.
    bool columns_are_rows() const { return dx == transposed; }
};

// y = x Wᵀ + bias.
inline Gemm product_y(const lora_ops_weight& w, int64_t n, int64_t k, const void* x, int64_t m, int64_t stride_x,
                      const void* bias, void* y, int64_t stride_y, int dtype) {
    return {w.nf4, n, k, x, m, stride_x, bias, y, stride_y, static_cast<lora_ops_dtype>(dtype), false, n, k,
            w.dense, w.stride, w.dense && w.transposed};
}

// dX = dY W.
inline Gemm product_dx(const lora_ops_weight& w, int64_t n, int64_t k, const void* dy, int64_t m, int64_t stride_dy,
                       void* dx, int64_t stride_dx, int dtype) {
    return {w.nf4, n, k, dy, m, stride_dy, nullptr, dx, stride_dx, static_cast<lora_ops_dtype>(dtype), true, k, n,
            w.dense, w.stride, w.dense && w.transposed};
}

// Tasks write disjoint parts of y and may run in any order, on any thread. Which terms are added to which, and in which
// order, depends on the shape alone: results do not change with the number of threads.
struct GemmPlan {
    int64_t tasks;
    int64_t task_rows;      // of y; the rest of a task's extent is up to the route
    int64_t scratch_bytes;  // of each thread
    int64_t shared_bytes;   // that prepare writes and all tasks read
};

// One way to compute products with a weight of either kind.
struct GemmRoute {
    bool (*serves)(const Gemm& g);
    GemmPlan (*plan)(const Gemm& g, int n_threads);
    void (*prepare)(const Gemm& g, char* shared);  // once, before the tasks; or NULL
    void (*task)(const Gemm& g, const GemmPlan& plan, int64_t task, const char* shared, char* scratch);
    bool fuses = false;  // whether it takes a low-rank update
};

// Dots multiply along the depth, for few rows of x; panels of W are transposed, which pays for many. routes.cpp chooses.
extern const GemmRoute kPortableDots, kPortablePanels;
extern const GemmRoute kAvx2RegisterDots, kAvx2OneRowDx, kAvx2Dots, kAvx2RowSums, kAvx2Panels;
extern const GemmRoute kAvx512RegisterDots, kAvx512Dots, kAvx512RowSums, kAvx512Panels;
extern const GemmRoute kNeonDots, kNeonPanels, kNeonBf16Panels;
extern const GemmRoute kBf16RegisterDots, kBf16RaggedDots, kBf16WideDots, kBf16Panels;

// Runs it on the instruction set in use; a lora_ops_status.
int run_gemm(const Gemm& g, int n_threads);

// Whether the instruction set in use can do this product with a low-rank update.
bool gemm_fuses(const Gemm& g);

}  // namespace lora_ops
