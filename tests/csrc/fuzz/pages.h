// lora_ops_adamw_pages against lora_ops_adamw on whole extents, wherever these are before.
#pragma once

#include <stdio.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "fuzz.h"

namespace fuzz {

// Extents with slices, the pages that a step is given, and what they should hold.
class Extents {
  public:
    explicit Extents(Random& random)
        : random_(random),
          extent_bytes(4096 * random.integer(1, random.integer(0, 9) ? 4 : 80)),  // at times more than a piece
          n(random.integer(1, 7)),
          file_(tmpfile()),
          held_(static_cast<size_t>(n)),
          pages(static_cast<size_t>(n)) {
        FUZZ_CHECK(file_ && !ftruncate(fd(), n * extent_bytes));
        for (int64_t e = 0; e < n; ++e) {
            pages[e] = {-1, 0, 0, 0, static_cast<int64_t>(slices.size()), 0};
            place();
            pages[e].end = static_cast<int64_t>(slices.size());
        }
        frames_.resize(static_cast<size_t>(random.integer(1, 5)));
        for (auto& frame : frames_) {
            frame.resize(static_cast<size_t>(extent_bytes));
            for (char& c : frame) c = static_cast<char>(random.bits());
        }
        std::vector<int64_t> free = shuffled(static_cast<int64_t>(frames_.size()));
        for (int64_t e = 0; e < n; ++e) {
            held_[e].resize(static_cast<size_t>(extent_bytes));
            const bool in_frame = !free.empty() && random.coin();
            pages[e].dirty = in_frame && random.coin();
            pages[e].stored = random.coin();
            if (pages[e].dirty || pages[e].stored) fill(held_[e]);
            if (pages[e].stored) {
                std::vector<char> there = held_[e];
                if (pages[e].dirty) fill(there);  // what it held before
                store(e, there);
            }
            if (!in_frame) continue;
            pages[e].frame = free.back();
            free.pop_back();
            frames_[pages[e].frame] = held_[e];
        }
    }
    ~Extents() { fclose(file_); }
    Extents(const Extents&) = delete;

    // Some extents, as a step takes them.
    void choose() {
        order.clear();
        const std::vector<int64_t> any = shuffled(n);
        const int64_t count = random_.integer(0, n);
        std::vector<char> spared(frames_.size(), 1);
        for (const bool here : {true, false}) {
            for (int64_t i = 0; i < count; ++i) {
                if ((pages[any[i]].frame >= 0) != here) continue;
                order.push_back(any[i]);
                if (here) spared[pages[any[i]].frame] = 0;
            }
        }
        spare.clear();
        for (const int64_t f : shuffled(static_cast<int64_t>(frames_.size()))) {
            if (spared[f]) spare.push_back(f);
        }
    }

    int run(const float* constants, const uint64_t* seed, int threads, lora_ops_page_report* report) {
        std::vector<char*> addresses;
        for (auto& frame : frames_) addresses.push_back(frame.data());
        const lora_ops_page_table table = {fd(), extent_bytes, addresses.data(), static_cast<int64_t>(addresses.size()),
                                           pages.data(), n, order.data(), static_cast<int64_t>(order.size()),
                                           spare.data(), static_cast<int64_t>(spare.size())};
        return lora_ops_adamw_pages(&table, slices.data(), static_cast<int64_t>(slices.size()), constants, 2,
                                    dynamic_map(true).data(), dynamic_map(false).data(), seed, threads, report);
    }

    // The same step of what the extents should hold, with other parameters.
    void run_whole(const float* constants, const uint64_t* seed) {
        for (const int64_t e : order) {
            for (int64_t i = pages[e].begin; i < pages[e].end; ++i) {
                lora_ops_adamw_slice s = slices[i];
                s.param = expected[i].data();
                char* const base = held_[e].data();
                s.exp_avg = base + reinterpret_cast<intptr_t>(s.exp_avg);
                s.exp_avg_sq = base + reinterpret_cast<intptr_t>(s.exp_avg_sq);
                if (s.exp_avg_absmax) {
                    s.exp_avg_absmax = reinterpret_cast<float*>(base + reinterpret_cast<intptr_t>(s.exp_avg_absmax));
                    s.exp_avg_sq_absmax = reinterpret_cast<float*>(base + reinterpret_cast<intptr_t>(s.exp_avg_sq_absmax));
                }
                FUZZ_CHECK(lora_ops_adamw(&s, 1, constants, 2, dynamic_map(true).data(), dynamic_map(false).data(), seed,
                                          1) == LORA_OPS_OK);
            }
        }
    }

    // Every extent is where its page says, and in one place.
    void check_pages() const {
        std::vector<int> held(frames_.size());
        for (const lora_ops_page& p : pages) {
            FUZZ_CHECK(p.frame >= -1 && p.frame < static_cast<int64_t>(frames_.size()));
            if (p.frame >= 0) FUZZ_CHECK(++held[p.frame] == 1);
            if (p.frame < 0) FUZZ_CHECK(!p.dirty);
        }
    }

    void check_content() const {
        check_pages();
        for (int64_t e = 0; e < n; ++e) {
            const lora_ops_page& p = pages[e];
            if (p.frame >= 0) FUZZ_CHECK(frames_[p.frame] == held_[e]);
            if (p.dirty) continue;
            std::vector<char> there(static_cast<size_t>(extent_bytes));
            if (p.stored) {
                FUZZ_CHECK(pread(fd(), there.data(), there.size(), e * extent_bytes) == extent_bytes);
                FUZZ_CHECK(p.checksum == checksum(there));
            }
            FUZZ_CHECK(there == held_[e]);
        }
        for (size_t i = 0; i < slices.size(); ++i) FUZZ_CHECK(params[i] == expected[i]);
    }

    // Damage an extent of the step that has to be read; answers which, or -1 where there is none.
    int64_t damage(bool cut) {
        for (const int64_t e : order) {
            // One that ends with a zero may be whole again after a write-back behind it.
            if (pages[e].frame >= 0 || !pages[e].stored || !held_[e].back()) continue;
            const int64_t at = e * extent_bytes + random_.integer(0, extent_bytes - 1);
            char byte;
            FUZZ_CHECK(pread(fd(), &byte, 1, at) == 1);
            byte = static_cast<char>(byte ^ 1 << random_.integer(0, 7));
            FUZZ_CHECK(cut ? !ftruncate(fd(), at) : pwrite(fd(), &byte, 1, at) == 1);
            return e;
        }
        return -1;
    }

    // Whether the next step writes nothing back: nothing is dirty before it, and none of its own frames is passed on.
    bool only_reads() const {
        const auto dirty = [](const lora_ops_page& p) { return p.dirty != 0; };
        const auto missing = [&](int64_t e) { return pages[e].frame < 0; };
        return std::none_of(pages.begin(), pages.end(), dirty) &&
               std::count_if(order.begin(), order.end(), missing) <= static_cast<int64_t>(spare.size());
    }

    int64_t count_read() const {
        return std::count_if(order.begin(), order.end(), [&](int64_t e) { return pages[e].frame < 0 && pages[e].stored; });
    }

  private:
    Random& random_;

  public:
    const int64_t extent_bytes, n;

  private:
    FILE* const file_;
    std::vector<std::vector<char>> held_, frames_;

  public:
    std::vector<lora_ops_page> pages;
    std::vector<lora_ops_adamw_slice> slices;
    std::vector<Matrix> params, expected, grads;
    std::vector<int64_t> order, spare;

  private:
    int fd() const { return fileno(file_); }

    std::vector<int64_t> shuffled(int64_t count) {
        std::vector<int64_t> all;
        for (int64_t i = 0; i < count; ++i) all.insert(all.begin() + random_.integer(0, i), i);
        return all;
    }

    // No zeros, so that a file with a hole holds something else.
    void fill(std::vector<char>& bytes) {
        for (size_t at = 0; at < bytes.size(); at += sizeof(float)) {
            const float x = 1e-3f + std::abs(random_.normal());
            memcpy(bytes.data() + at, &x, sizeof x);
        }
    }

    static uint64_t checksum(const std::vector<char>& bytes) {
        uint64_t sum;
        FUZZ_CHECK(lora_ops_checksum(bytes.data(), static_cast<int64_t>(bytes.size()), &sum) == LORA_OPS_OK);
        return sum;
    }

    void store(int64_t e, const std::vector<char>& bytes) {
        FUZZ_CHECK(pwrite(fd(), bytes.data(), bytes.size(), e * extent_bytes) == extent_bytes);
        pages[e].checksum = checksum(bytes);
    }

    // Slices in an extent, up to its end at times.
    void place() {
        int64_t used = 0;
        for (int64_t left = random_.integer(0, 3); left; --left) {
            const bool coded = random_.coin();
            const auto bytes = [&](int64_t count) { return coded ? 2 * (count + 4 * ceil_div(count, 256)) + 6 : 8 * count; };
            int64_t count = random_.length(extent_bytes);
            while (count && used + bytes(count) > extent_bytes) count = random_.coin() ? count - 1 : count / 2;
            const auto part = [&](int64_t size) {
                const int64_t at = used;
                used += (size + 3) / 4 * 4;
                return reinterpret_cast<char*>(at);
            };
            const int p = any_dtype(random_), g = any_dtype(random_);
            params.emplace_back(random_, p, 1, count);
            expected.push_back(params.back());
            grads.emplace_back(random_, g, 1, count);
            char *const m = part(coded ? count : 4 * count), *const v = part(coded ? count : 4 * count);
            float *ma = nullptr, *va = nullptr;
            if (coded) {
                ma = reinterpret_cast<float*>(part(4 * ceil_div(count, 256)));
                va = reinterpret_cast<float*>(part(4 * ceil_div(count, 256)));
            }
            slices.push_back({nullptr, nullptr, m, v, ma, va, count, p, g, random_.integer(0, 1), random_.integer(0, 9), 2,
                              256 * random_.integer(0, 9)});
        }
    }
};

inline void adamw_pages(Random& random) {
    Extents extents(random);
    for (size_t i = 0; i < extents.slices.size(); ++i) {
        extents.slices[i].param = extents.params[i].data();
        extents.slices[i].grad = extents.grads[i].data();
    }
    const float constants[16] = {0.999f, 0.1f, 0.999f, 0.001f, 1e-8f, 1e-3f, 30.0f, 1.0f,
                                 1.0f,   0.2f, 0.99f,  0.01f,  1e-6f, 1e-2f, 10.0f, -1.0f};
    const uint64_t seed = random.bits();
    const uint64_t* const rounding = random.coin() ? &seed : nullptr;
    lora_ops_page_report report;
    for (int64_t steps = random.integer(1, 4); steps; --steps) {
        extents.choose();
        const int threads = static_cast<int>(random.integer(1, 3));
        const bool cut = random.coin();
        const int64_t damaged = random.integer(0, 5) ? -1 : extents.damage(cut);
        const int64_t reads = extents.count_read();
        const bool only_reads = extents.only_reads();
        const int status = extents.run(constants, rounding, threads, &report);
        if (damaged >= 0) {
            FUZZ_CHECK(status == LORA_OPS_IO);
            const bool truncated = report.failure == LORA_OPS_IO_TRUNCATED;
            FUZZ_CHECK(truncated ? cut : report.failure == LORA_OPS_IO_CHECKSUM);
            // A write-back behind the end would fill what was cut off with zeros.
            if (cut && only_reads) FUZZ_CHECK(truncated);
            FUZZ_CHECK(cut ? report.failed_extent >= damaged : report.failed_extent == damaged);
            FUZZ_CHECK(extents.pages[report.failed_extent].frame < 0);
            return extents.check_pages();
        }
        FUZZ_CHECK(status == LORA_OPS_OK && report.failure == 0);
        FUZZ_CHECK(report.bytes_read == reads * extents.extent_bytes);
        extents.run_whole(constants, rounding);
        extents.check_content();
    }
    // What reaches behind its extent is refused.
    if (extents.slices.empty() || !extents.slices[0].n) return;
    lora_ops_adamw_slice& s = extents.slices[0];
    void** const state = random.coin() ? &s.exp_avg : &s.exp_avg_sq;
    *state = reinterpret_cast<char*>(extents.extent_bytes - (s.exp_avg_absmax ? 1 : 4) * s.n + 4);
    FUZZ_CHECK(extents.run(constants, rounding, 1, &report) == LORA_OPS_BAD_ARGUMENT);
}

}  // namespace fuzz
