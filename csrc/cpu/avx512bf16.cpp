// AVX-512 BF16 and VBMI: products of bfloat16 activations and an NF4 or bfloat16 weight, low-rank update included.
// Everything else is avx512.cpp's.
//
// vdpbf16ps adds two products of bfloat16 to each of 16 fp32 sums; it reads denormals as zero, so that vcvtneps2bf16,
// which writes zero for them, loses nothing on the way to it.
#include <immintrin.h>
#include <string.h>

#include <new>

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

enum class Kind { kOther, kDotAligned, kDotAny, kWide, kPanels };

Kind kind_of(const Gemm& g) {
    if (g.dtype != LORA_OPS_BF16) return Kind::kOther;
    if (g.dx) return Kind::kPanels;
    if (!g.dense && g.k > 0 && is_aligned(g)) return g.m <= kMostDotRows ? Kind::kDotAligned : Kind::kPanels;
    if (!g.dense && g.m <= kMostAnyRows) return Kind::kDotAny;
    return g.m <= most_wide_rows(g) ? Kind::kWide : Kind::kPanels;
}

GemmPlan gemm_plan(const Gemm& g, int n_threads) {
    GemmPlan plan = {};
    switch (kind_of(g)) {
        case Kind::kOther: return kAvx512Gemm.plan(g, n_threads);
        case Kind::kPanels: return panel_plan<Bf16Engine>(g, n_threads);
        case Kind::kDotAligned:
            plan.shared_bytes = DotShared::bytes(g);
            plan.scratch_bytes = DotScratch(g, nullptr).bytes;
            [[fallthrough]];
        case Kind::kDotAny: plan.tasks = ceil_div(g.n, kDotColumns); return plan;
        case Kind::kWide: break;
    }
    plan.tasks = ceil_div(g.n, kWideColumns);
    plan.shared_bytes = g.m * wide_stride(g.k) * int64_t{sizeof(BF16)};
    plan.scratch_bytes = WideScratch::bytes(g.m);
    return plan;
}

void gemm_prepare(const Gemm& g, const GemmPlan& plan, char* shared) {
    switch (kind_of(g)) {
        case Kind::kOther: return kAvx512Gemm.prepare(g, plan, shared);
        case Kind::kWide: return pack_wide(g, reinterpret_cast<BF16*>(shared));
        case Kind::kDotAligned: break;
        case Kind::kDotAny:
        case Kind::kPanels: return;
    }
    const DotShared dots(g, shared);
    if (!g.w.absmax) new (dots.map) ScaleBytes(g.w.absmax_map);
    pack_dots(g, dots.x);
}

void gemm_task(const Gemm& g, const GemmPlan& plan, int64_t task, const char* shared, char* scratch) {
    const BF16* const x = reinterpret_cast<const BF16*>(shared);
    switch (kind_of(g)) {
        case Kind::kOther: return kAvx512Gemm.task(g, plan, task, shared, scratch);
        case Kind::kPanels: return panel_task<Bf16Engine, BF16>(g, plan, task, scratch);
        case Kind::kDotAligned: return dot_aligned_task(g, DotShared(g, const_cast<char*>(shared)), task, scratch);
        case Kind::kWide: return wide_dot_task(g, x, task, scratch);
        case Kind::kDotAny: break;
    }
    switch (g.m) {
        case 1: return dot_any_task<1>(g, task);
        case 2: return dot_any_task<2>(g, task);
        case 3: return dot_any_task<3>(g, task);
        case 4: return dot_any_task<4>(g, task);
    }
}

}  // namespace

const GemmKernels kAvx512Bf16Gemm = {gemm_plan, gemm_prepare, gemm_task, fuses};

}  // namespace lora_ops
