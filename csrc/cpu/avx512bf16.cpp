// AVX-512 BF16 and VBMI: products of bfloat16 activations and an NF4 or bfloat16 weight, low-rank update included.
// Everything else is avx512.cpp's.
//
// vdpbf16ps adds two products of bfloat16 to each of 16 fp32 sums; it reads denormals as zero, so that vcvtneps2bf16,
// which writes zero for them, loses nothing on the way to it.
#include <immintrin.h>
#include <string.h>

#include "gemm.h"
#include "kernels.h"
#include "load_avx512.inl"
#include "nf4_table.h"
#include "scalar.h"

#include "nf4.inl"
#include "gemm.inl"

#include "decode_avx512bf16.inl"
#include "dots_avx512bf16.inl"
#include "panels_avx512bf16.inl"
#include "wide_dots_avx512bf16.inl"

namespace lora_ops {
namespace {

bool fuses(const Gemm& g) { return g.dtype == LORA_OPS_BF16; }

bool takes_dots(const Gemm& g) { return !g.dx && !g.dense && g.m <= kMostDotRows; }
bool takes_wide_dots(const Gemm& g) { return !g.dx && g.m <= most_wide_rows(g); }

GemmPlan gemm_plan(const Gemm& g, int n_threads) {
    if (g.dtype != LORA_OPS_BF16) return kAvx512Gemm.plan(g, n_threads);
    GemmPlan plan = {};
    plan.dot = true;
    if (takes_dots(g)) {
        plan.tasks = ceil_div(g.n, kDotColumns);
        plan.shared_bytes = is_aligned(g) ? g.m * g.k * int64_t{sizeof(BF16)} : 0;
        return plan;
    }
    if (takes_wide_dots(g)) {
        plan.tasks = ceil_div(g.n, kWideColumns);
        plan.shared_bytes = g.m * wide_stride(g.k) * int64_t{sizeof(BF16)};
        plan.scratch_bytes = WideScratch::bytes(g.m);
        return plan;
    }
    return panel_plan<Bf16Engine>(g, n_threads);
}

void gemm_prepare(const Gemm& g, const GemmPlan& plan, char* shared) {
    if (!plan.shared_bytes) return;
    BF16* const to = reinterpret_cast<BF16*>(shared);
    if (!takes_dots(g)) return pack_wide(g, !g.dense && is_aligned(g), to);
    for (int64_t i = 0; i < g.m; ++i) {
        const BF16* const from = static_cast<const BF16*>(g.a) + i * g.stride_a;
        for (int64_t k = 0; k < g.k; k += 32) _mm512_store_si512(to + i * g.k + k, mix(_mm512_loadu_si512(from + k)));
    }
}

void gemm_task(const Gemm& g, const GemmPlan& plan, int64_t task, const char* shared, char* scratch) {
    if (g.dtype != LORA_OPS_BF16) return kAvx512Gemm.task(g, plan, task, shared, scratch);
    const BF16* const x = reinterpret_cast<const BF16*>(shared);
    if (!plan.dot) return panel_task<Bf16Engine, BF16>(g, plan, task, scratch);
    if (!takes_dots(g)) return wide_dot_task(g, x, task, scratch);
    switch (g.m) {
        case 1: return dot_task<1>(g, x, task);
        case 2: return dot_task<2>(g, x, task);
        case 3: return dot_task<3>(g, x, task);
        case 4: return dot_task<4>(g, x, task);
        case 5: return dot_task<5>(g, x, task);
        case 6: return dot_task<6>(g, x, task);
        case 7: return dot_task<7>(g, x, task);
        case 8: return dot_task<8>(g, x, task);
    }
}

}  // namespace

const GemmKernels kAvx512Bf16Gemm = {gemm_plan, gemm_prepare, gemm_task, fuses};

}  // namespace lora_ops
