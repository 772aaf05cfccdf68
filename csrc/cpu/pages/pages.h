// A step of AdamW over extents of a file. Where the file is in the page cache a transfer is work for a core, like the
// update: so there is no thread for transfers. Every thread takes an extent, brings it if need be, and updates it, and
// none waits for another. What the disk has to bring is asked for ahead.
#pragma once

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <sys/uio.h>
#endif

#include "adamw/adamw.h"
#include "pages/checksum.h"

namespace lora_ops {
namespace {

// Written, then read into, before the next piece: it is in the second-level cache the second time. Whole rows of a
// checksum.
constexpr int64_t kPiece = 128 << 10;
constexpr int64_t kAhead = 16 << 20;  // bytes that the disk is asked for before a thread needs them

using Clock = std::chrono::steady_clock;

int64_t nanoseconds(Clock::duration d) { return std::chrono::duration_cast<std::chrono::nanoseconds>(d).count(); }

struct Update {
    const lora_ops_adamw_slice* slices;
    const float* constants;
    AdamwCodes codes;
    const uint64_t* seed;
};

// The slice whose states are at offsets in the frame.
inline lora_ops_adamw_slice in_frame(lora_ops_adamw_slice s, char* frame) {
    const auto move = [&](auto*& p) {
        p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(frame + reinterpret_cast<intptr_t>(p));
    };
    move(s.exp_avg);
    move(s.exp_avg_sq);
    if (s.exp_avg_absmax) {
        move(s.exp_avg_absmax);
        move(s.exp_avg_sq_absmax);
    }
    return s;
}

class Pages {
  public:
    Pages(const lora_ops_page_table& table, const Update& update)
        : t_(table), update_(update), adamw_(adamw_kernel()), holds_(static_cast<size_t>(table.n_frames), -1),
          idle_(table.spare, table.spare + table.n_spare) {
        for (int64_t e = 0; e < t_.n_pages; ++e) {
            if (t_.pages[e].frame >= 0) holds_[t_.pages[e].frame] = e;
        }
        done_.reserve(static_cast<size_t>(t_.n_frames));  // nothing is allocated where it could fail in a thread
    }

    // What one of several threads does.
    void work() {
        for (int64_t extent, frame; take(&extent, &frame);) {
            lora_ops_page& page = t_.pages[extent];
            char* const memory = t_.frames[frame];
            if (page.frame < 0 && !bring(extent, frame)) return;
            for (int64_t i = page.begin; i < page.end; ++i) {
                const lora_ops_adamw_slice s = in_frame(update_.slices[i], memory);
                if (s.n) adamw_(s, 0, s.n, update_.constants + 8 * s.row, update_.codes, update_.seed);
            }
            page.dirty = 1;
            const std::lock_guard<std::mutex> hold(mutex_);
            done_.push_back(frame);
            freed_.notify_one();
        }
    }

    const lora_ops_page_report& report() const { return report_; }

  private:
    // The next extent, and the frame that it is in or will be in; false when there is none.
    bool take(int64_t* extent, int64_t* frame) {
        std::unique_lock<std::mutex> hold(mutex_);
        // Whoever holds the frame that is waited for needs no other: it will be freed, or the step has failed.
        freed_.wait(hold, [&] {
            return failed() || next_ == t_.n_order || t_.pages[t_.order[next_]].frame >= 0 || !idle_.empty() ||
                   !done_.empty();
        });
        if (failed() || next_ == t_.n_order) {
            freed_.notify_all();
            return false;
        }
        *extent = t_.order[next_++];
        *frame = t_.pages[*extent].frame;
        if (*frame >= 0) return true;
        auto& from = idle_.empty() ? done_ : idle_;  // the extent that was computed last is still in the cache
        *frame = from.back();
        from.pop_back();
        return true;
    }

    // Write back what the frame holds and read the extent into it, piece by piece.
    bool bring(int64_t extent, int64_t frame) {
        ask_ahead();
        char* const memory = t_.frames[frame];
        lora_ops_page& page = t_.pages[extent];
        const int64_t before = holds_[frame];
        lora_ops_page* const victim = before < 0 ? nullptr : &t_.pages[before];
        const bool out = victim && victim->dirty;
        Checksum written, read;
        int64_t read_ns = 0, write_ns = 0;
        for (int64_t at = 0; at < t_.extent_bytes; at += kPiece) {
            const int64_t n = std::min(kPiece, t_.extent_bytes - at);
            const auto start = Clock::now();
            if (out) {
                written.add(memory + at, n);
                if (!write(before, at, memory + at, n)) return false;
            }
            const auto middle = Clock::now();
            if (at == 0 && victim) {  // from here on the frame is nobody's
                holds_[frame] = victim->frame = -1;
                if (out) {  // and until all is written, no checksum is right
                    victim->dirty = 0;
                    victim->stored = 1;
                    victim->checksum = 0;
                }
            }
            if (!page.stored) {
                memset(memory + at, 0, static_cast<size_t>(n));
            } else {
                if (!this->read(extent, at, memory + at, n)) return false;
                read.add(memory + at, n);
            }
            write_ns += nanoseconds(middle - start);
            read_ns += nanoseconds(Clock::now() - middle);
        }
        if (out) victim->checksum = written.value();
        if (page.stored && read.value() != page.checksum) return fail(LORA_OPS_IO_CHECKSUM, extent, 0, 0);
        page.frame = frame;
        holds_[frame] = extent;
        const std::lock_guard<std::mutex> hold(mutex_);
        report_.write_ns += write_ns;
        report_.read_ns += read_ns;
        report_.bytes_written += out ? t_.extent_bytes : 0;
        report_.bytes_read += page.stored ? t_.extent_bytes : 0;
        return true;
    }

    bool write(int64_t extent, int64_t at, const char* from, int64_t n) {
        const int64_t begin = extent * t_.extent_bytes + at;
        for (int64_t done = 0; done < n;) {
            const ssize_t moved = pwrite(static_cast<int>(t_.fd), from + done, static_cast<size_t>(n - done), begin + done);
            if (moved < 0 && errno == EINTR) continue;
            if (moved <= 0) return fail(LORA_OPS_IO_WRITE, extent, begin + done, moved < 0 ? errno : EIO);
            done += moved;
        }
        return true;
    }

    bool read(int64_t extent, int64_t at, char* to, int64_t n) {
        const int64_t begin = extent * t_.extent_bytes + at;
        for (int64_t done = 0; done < n;) {
            const ssize_t moved = pread(static_cast<int>(t_.fd), to + done, static_cast<size_t>(n - done), begin + done);
            if (moved < 0 && errno == EINTR) continue;
            if (moved < 0) return fail(LORA_OPS_IO_READ, extent, begin + done, errno);
            if (moved == 0) return fail(LORA_OPS_IO_TRUNCATED, extent, begin + done, 0);
            done += moved;
        }
        return true;
    }

    // Have the disk bring extents that are not in the page cache; of one that is, a byte comes at once.
    void ask_ahead() {
#if defined(__linux__) && defined(RWF_NOWAIT)
        for (;;) {
            int64_t extent;
            bool stored;
            {
                const std::lock_guard<std::mutex> hold(mutex_);
                asked_ = std::max(asked_, next_);
                if (asked_ >= std::min(t_.n_order, next_ + 1 + kAhead / t_.extent_bytes)) return;
                extent = t_.order[asked_++];
                stored = t_.pages[extent].stored;
            }
            const off_t begin = extent * t_.extent_bytes;
            char byte;
            const iovec to = {&byte, 1};
            if (stored && preadv2(static_cast<int>(t_.fd), &to, 1, begin, RWF_NOWAIT) != 1) {
                posix_fadvise(static_cast<int>(t_.fd), begin, t_.extent_bytes, POSIX_FADV_WILLNEED);
            }
        }
#endif
    }

    bool failed() const { return report_.failure != 0; }

    bool fail(lora_ops_io_failure failure, int64_t extent, int64_t byte, int error) {
        const std::lock_guard<std::mutex> hold(mutex_);
        if (!failed()) {
            report_.failure = failure;
            report_.failed_extent = extent;
            report_.failed_byte = byte;
            report_.failed_errno = error;
        }
        freed_.notify_all();
        return false;
    }

    const lora_ops_page_table& t_;
    const Update& update_;
    AdamwKernel adamw_;
    std::mutex mutex_;
    std::condition_variable freed_;
    std::vector<int64_t> holds_;  // the extent in each frame, or -1
    std::vector<int64_t> idle_;   // frames that no extent of the step is in
    std::vector<int64_t> done_;   // frames whose extent is updated
    int64_t next_ = 0, asked_ = 0;
    lora_ops_page_report report_ = {};
};

}  // namespace
}  // namespace lora_ops
