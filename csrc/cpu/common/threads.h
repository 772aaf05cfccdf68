// Work that is split over threads, and their memory.
#pragma once

#include <stdint.h>

#include <algorithm>

namespace lora_ops {

// Below this many elements waking a thread costs more than it saves.
constexpr int64_t kElementsPerThread = 1 << 15;

// Calls work(begin, end) on pieces of [begin, end) that meet at multiples of align, one piece a thread.
template <class Work>
void parallel(int64_t begin, int64_t end, int64_t align, int n_threads, Work work) {
    const int64_t useful = (end - begin + kElementsPerThread - 1) / kElementsPerThread;
    const int64_t pieces = std::min<int64_t>(n_threads, useful);
    if (pieces <= 1) return work(begin, end);
    const int64_t first = begin / align;
    const int64_t blocks = (end + align - 1) / align - first;
#pragma omp parallel for num_threads(static_cast<int>(pieces)) schedule(static, 1)
    for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t from = std::max(begin, (first + blocks * piece / pieces) * align);
        const int64_t to = std::min(end, (first + blocks * (piece + 1) / pieces) * align);
        if (from < to) work(from, to);
    }
}

// What memory of a thread is for: each use has its own, so that one may call the other.
enum class Use { kTask, kProduct, kLora, kLowRank };

// At least `bytes`, aligned to a cache line, with the contents undefined; or NULL. It stays allocated until the thread
// ends: pages of fresh memory cost as much as the kernels.
char* thread_memory(Use use, int64_t bytes);

}  // namespace lora_ops
