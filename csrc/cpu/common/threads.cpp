#include "common/threads.h"

#include <memory>
#include <new>

namespace lora_ops {
namespace {

constexpr std::align_val_t kAlign{64};

struct Free {
    void operator()(char* p) const { operator delete[](p, kAlign); }
};

struct Memory {
    std::unique_ptr<char[], Free> bytes;
    int64_t size = 0;
};

}  // namespace

// A function of its own, so that every thread of a team passes the declaration and frees its memory when it ends.
char* thread_memory(Use use, int64_t bytes) {
    thread_local Memory memory[4];
    Memory& own = memory[static_cast<int>(use)];
    if (own.size < bytes) {
        own = {};
        own.bytes.reset(new (kAlign, std::nothrow) char[static_cast<size_t>(bytes)]);
        own.size = own.bytes ? bytes : 0;
    }
    return own.bytes.get();
}

}  // namespace lora_ops
