// The routes of a product by instruction set, and the threads that run its tasks.
#include <algorithm>
#include <array>
#include <atomic>

#include "common/arguments.h"
#include "common/scalar.h"
#include "common/threads.h"
#include "gemm/gemm.h"
#include "isa/isa.h"

namespace lora_ops {
namespace {

// The first that serves a product takes it; the last serves all.
using Routes = std::array<const GemmRoute*, 8>;
constexpr Routes kPortable = {&kPortableDots, &kPortablePanels};
#if defined(LORA_OPS_X86)
constexpr Routes kAvx2 = {&kAvx2RegisterDots, &kAvx2OneRowDx, &kAvx2Dots, &kAvx2RowSums, &kAvx2Panels};
constexpr Routes kAvx512 = {&kAvx512RegisterDots, &kAvx512Dots, &kAvx512RowSums, &kAvx512Panels};
constexpr Routes kAvx512Bf16 = {&kBf16RegisterDots,   &kBf16RaggedDots, &kBf16WideDots,  &kBf16Panels,
                                &kAvx512RegisterDots, &kAvx512Dots,     &kAvx512RowSums, &kAvx512Panels};
#else
constexpr Routes kAvx2 = {}, kAvx512 = {}, kAvx512Bf16 = {};  // never in use
#endif
#if defined(LORA_OPS_ARM64)
constexpr Routes kNeon = {&kNeonDots, &kNeonPanels};
constexpr Routes kNeonBf16 = {&kNeonDots, &kNeonBf16Panels, &kNeonPanels};
#else
constexpr Routes kNeon = {}, kNeonBf16 = {};
#endif

// To wake a second thread takes 5 to 50 µs, in which one multiplies half a million elements of a dense weight by up to 4 rows.
int64_t useful_threads(const Gemm& g) {
    constexpr int64_t kDenseElementsPerThread = 1 << 18;
    if (!g.dense) return g.n * g.k / kElementsPerThread + 1;
    return g.n * g.k * ceil_div(g.m, 4) / kDenseElementsPerThread + 1;
}

const GemmRoute& route_of(const Gemm& g) {
    const Routes& routes = for_current_isa<kPortable, kAvx2, kAvx512, kAvx512Bf16, kNeon, kNeonBf16>();
    return **std::find_if(routes.begin(), routes.end(), [&](const GemmRoute* route) { return route->serves(g); });
}

}  // namespace

bool gemm_fuses(const Gemm& g) { return route_of(g).fuses; }

int run_gemm(const Gemm& g, int n_threads) {
    if (g.n < 0 || g.k < 0 || g.m < 0 || n_threads < 1 || !is_dtype(g.dtype)) return LORA_OPS_BAD_ARGUMENT;
    if (g.m == 0 || g.columns == 0) return LORA_OPS_OK;
    if (!g.y || (g.m > 1 && g.stride_y < g.columns)) return LORA_OPS_BAD_ARGUMENT;
    if (g.depth > 0 && (!g.x || (!g.dense && !is_valid(&g.w)))) return LORA_OPS_BAD_ARGUMENT;
    const GemmRoute& route = route_of(g);
    if (g.low_rank && !route.fuses) return LORA_OPS_BAD_ARGUMENT;
    const GemmPlan plan = route.plan(g, n_threads);
    const int64_t useful = useful_threads(g);
    [[maybe_unused]] const int threads = static_cast<int>(std::min({int64_t{n_threads}, plan.tasks, useful}));
    char* const shared = thread_memory(Use::kProduct, plan.shared_bytes);
    if (plan.shared_bytes && !shared) return LORA_OPS_NO_MEMORY;
    if (route.prepare) route.prepare(g, shared);
    std::atomic<bool> has_memory{true};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int64_t task = 0; task < plan.tasks; ++task) {
        char* const scratch = thread_memory(Use::kTask, plan.scratch_bytes);
        if (plan.scratch_bytes && !scratch) {
            has_memory.store(false, std::memory_order_relaxed);
        } else {
            route.task(g, plan, task, shared, scratch);
        }
    }
    return has_memory.load(std::memory_order_relaxed) ? LORA_OPS_OK : LORA_OPS_NO_MEMORY;
}

}  // namespace lora_ops
