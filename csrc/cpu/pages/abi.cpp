// The C ABI of AdamW's steps over extents of a file: checks arguments and starts the threads.
#include <algorithm>
#include <new>

#include "adamw/adamw.h"
#include "pages/pages.h"

namespace lora_ops {
namespace {

// Bytes of the states of a slice are within its extent.
bool fits(const lora_ops_adamw_slice& s, int64_t extent_bytes) {
    const bool coded = s.exp_avg_absmax;
    const auto inside = [&](const void* offset, int64_t bytes) {
        const auto at = reinterpret_cast<intptr_t>(offset);
        return at >= 0 && at <= extent_bytes - bytes;
    };
    const int64_t each = coded ? s.n : 4 * s.n, absmax = 4 * ((s.n + 255) / 256);
    if (each > extent_bytes || !inside(s.exp_avg, each) || !inside(s.exp_avg_sq, each)) return false;
    return !coded || (inside(s.exp_avg_absmax, absmax) && inside(s.exp_avg_sq_absmax, absmax));
}

bool is_valid(const lora_ops_page_table& t, int64_t count) {
    if (t.extent_bytes <= 0 || t.extent_bytes % kChecksumRow || t.n_frames < 0 || t.n_pages < 0) return false;
    if (t.n_order < 0 || t.n_spare < 0 || t.n_spare > t.n_frames) return false;
    if ((t.n_frames && !t.frames) || (t.n_pages && !t.pages) || (t.n_order && !t.order) || (t.n_spare && !t.spare)) return false;
    for (int64_t e = 0; e < t.n_pages; ++e) {
        const lora_ops_page& p = t.pages[e];
        if (p.frame < -1 || p.frame >= t.n_frames || p.begin < 0 || p.end < p.begin || p.end > count) return false;
    }
    for (int64_t i = 0; i < t.n_spare; ++i) {
        if (t.spare[i] < 0 || t.spare[i] >= t.n_frames) return false;
    }
    bool missing = false;
    for (int64_t i = 0; i < t.n_order; ++i) {
        if (t.order[i] < 0 || t.order[i] >= t.n_pages) return false;
        const bool here = t.pages[t.order[i]].frame >= 0;
        if (here && missing) return false;
        missing |= !here;
    }
    return t.n_order == 0 || t.n_spare > 0 || t.pages[t.order[0]].frame >= 0;
}

}  // namespace
}  // namespace lora_ops

using namespace lora_ops;

int lora_ops_adamw_pages(const lora_ops_page_table* table, const lora_ops_adamw_slice* slices, int64_t count,
                         const float* constants, int64_t rows, const float* signed_map, const float* unsigned_map,
                         const uint64_t* seed, int n_threads, lora_ops_page_report* report) try {
    if (!table || !report || count < 0 || n_threads < 1 || !is_valid(*table, count)) return LORA_OPS_BAD_ARGUMENT;
    if ((count && (!slices || !constants)) || !are_maps(signed_map, unsigned_map)) return LORA_OPS_BAD_ARGUMENT;
    char somewhere = 0;  // an offset of 0 is no null pointer
    for (int64_t i = 0; i < count; ++i) {
        if (!is_valid(in_frame(slices[i], &somewhere), rows) || !fits(slices[i], table->extent_bytes)) return LORA_OPS_BAD_ARGUMENT;
    }
    const auto signed_code = code_of(signed_map), unsigned_code = code_of(unsigned_map);
    const Update update = {slices, constants, {signed_code.get(), unsigned_code.get()}, seed};
    Pages pages(*table, update);
    const int threads = static_cast<int>(std::min<int64_t>({n_threads, table->n_frames, table->n_order}));
    if (threads <= 1) {
        pages.work();
    } else {
#pragma omp parallel num_threads(threads)
        pages.work();
    }
    *report = pages.report();
    return report->failure ? LORA_OPS_IO : LORA_OPS_OK;
} catch (const std::bad_alloc&) {
    return LORA_OPS_NO_MEMORY;
}
