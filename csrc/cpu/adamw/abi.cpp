// The C ABI of AdamW: checks arguments and splits the work over threads.
#include <algorithm>
#include <new>
#include <vector>

#include "adamw/adamw.h"
#include "common/arguments.h"
#include "common/threads.h"
#include "isa/isa.h"

namespace lora_ops {

AdamwKernel adamw_kernel() {
    return for_current_isa<kPortableAdamw, kAvx2Adamw, kAvx512Adamw, kAvx512Bf16Adamw, kNeonAdamw, kNeonAdamw>();
}

bool is_valid(const lora_ops_adamw_slice& s, int64_t rows) {
    if (s.n < 0 || s.row < 0 || s.row >= rows || s.first % kAdamwBlock) return false;
    if (!is_dtype(s.param_dtype) || !is_dtype(s.grad_dtype)) return false;
    if (!s.exp_avg_absmax != !s.exp_avg_sq_absmax) return false;
    return s.n == 0 || (s.param && s.grad && s.exp_avg && s.exp_avg_sq);
}

bool are_maps(const float* signed_map, const float* unsigned_map) {
    const auto ascends = [](const float* map) { return map && std::is_sorted(map, map + 256); };
    return ascends(signed_map) && ascends(unsigned_map);
}

}  // namespace lora_ops

using namespace lora_ops;

int lora_ops_adamw(const lora_ops_adamw_slice* slices, int64_t count, const float* constants, int64_t rows,
                   const float* signed_map, const float* unsigned_map, const uint64_t* seed, int n_threads) try {
    if (count < 0 || n_threads < 1) return LORA_OPS_BAD_ARGUMENT;
    if (count == 0) return LORA_OPS_OK;
    if (!slices || !constants || !are_maps(signed_map, unsigned_map)) return LORA_OPS_BAD_ARGUMENT;
    const auto signed_code = code_of(signed_map), unsigned_code = code_of(unsigned_map);
    const AdamwCodes codes = {signed_code.get(), unsigned_code.get()};

    std::vector<int64_t> start(static_cast<size_t>(count) + 1);  // of each slice, in elements of whole blocks
    for (int64_t i = 0; i < count; ++i) {
        if (!is_valid(slices[i], rows)) return LORA_OPS_BAD_ARGUMENT;
        start[i + 1] = start[i] + (slices[i].n + kAdamwBlock - 1) / kAdamwBlock * kAdamwBlock;
    }
    const AdamwKernel adamw = adamw_kernel();
    parallel(0, start[count], kAdamwBlock, n_threads, [&](int64_t begin, int64_t end) {
        int64_t i = std::upper_bound(start.begin(), start.end(), begin) - start.begin() - 1;
        for (; i < count && start[i] < end; ++i) {
            const int64_t from = std::max(begin - start[i], int64_t{0}), to = std::min(end - start[i], slices[i].n);
            if (from < to) adamw(slices[i], from, to, constants + 8 * slices[i].row, codes, seed);
        }
    });
    return LORA_OPS_OK;
} catch (const std::bad_alloc&) {
    return LORA_OPS_NO_MEMORY;
}
