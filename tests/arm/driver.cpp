// Serves the C ABI of a library to another process: reads calls from the standard input, makes them and answers on the
// standard output. remote.py is the other side, on a machine that cannot load the library itself.
//
//     driver LIBRARY [TIMES = 1]
//
// Integers are of 64 bits, in the byte order that both machines have. A call is
//     the length of the function's name, the name
//     the number of buffers, and for each its bytes' number and its bytes
//     the number of pointers that stand in buffers, and for each the buffer, its offset there, its target, the offset there
//     the number of arguments (at most 16), and for each a buffer or -1, and its offset there or else the value
// and the answer is the result and, for each buffer, its bytes as they are then.
//
// Every argument of the ABI is an integer or a pointer, and 64-bit machines pass either in a register or in 8 bytes of the
// stack; so all functions are called in one way, and what they return is 8 bytes of which the caller knows how many count. Buffers end where memory ends: to read or write beyond is a crash.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <string>
#include <vector>

namespace {

constexpr int kMostArguments = 16;
using A = int64_t;
using Function = A (*)(A, A, A, A, A, A, A, A, A, A, A, A, A, A, A, A);

[[noreturn]] void fail(const char* what) {
    fprintf(stderr, "driver: %s\n", what);
    exit(1);
}

void read_bytes(void* to, int64_t n) {
    if (n > 0 && fread(to, static_cast<size_t>(n), 1, stdin) != 1) fail("the call ends early");
}

int64_t read_integer() {
    int64_t value;
    read_bytes(&value, sizeof value);
    return value;
}

// Memory between two pages that nobody may touch.
class Buffer {
  public:
    explicit Buffer(int64_t size) : size_(size) {
        const int64_t page = sysconf(_SC_PAGESIZE), pages = (size + page - 1) / page;
        mapped_ = static_cast<size_t>((pages + 2) * page);
        memory_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (memory_ == MAP_FAILED) fail("no memory");
        if (pages && mprotect(memory_ + page, static_cast<size_t>(pages * page), PROT_READ | PROT_WRITE)) fail("mprotect");
        data_ = memory_ + (pages + 1) * page - size;
        read_bytes(data_, size);
    }
    Buffer(Buffer&& other) : size_(other.size_), mapped_(other.mapped_), memory_(other.memory_), data_(other.data_) {
        other.memory_ = nullptr;
    }
    ~Buffer() {
        if (memory_) munmap(memory_, mapped_);
    }
    char* at(int64_t offset) const { return data_ + offset; }
    void write() const {
        if (size_ && fwrite(data_, static_cast<size_t>(size_), 1, stdout) != 1) fail("nobody reads the answer");
    }

  private:
    int64_t size_;
    size_t mapped_;
    char *memory_, *data_;
};

void serve_call(void* library, int times, int64_t name_length) {
    std::string name(static_cast<size_t>(name_length), ' ');
    read_bytes(name.data(), name_length);
    void* const symbol = dlsym(library, name.c_str());
    if (!symbol) fail(dlerror());

    std::vector<Buffer> buffers;
    for (int64_t n = read_integer(); n > 0; --n) buffers.emplace_back(read_integer());
    for (int64_t n = read_integer(); n > 0; --n) {
        const int64_t buffer = read_integer(), offset = read_integer(), target = read_integer();
        const char* const pointer = buffers.at(static_cast<size_t>(target)).at(read_integer());
        memcpy(buffers.at(static_cast<size_t>(buffer)).at(offset), &pointer, sizeof pointer);
    }
    A a[kMostArguments] = {};
    const int64_t count = read_integer();
    if (count > kMostArguments) fail("too many arguments");
    for (int64_t i = 0; i < count; ++i) {
        const int64_t buffer = read_integer(), value = read_integer();
        a[i] = buffer < 0 ? value : reinterpret_cast<A>(buffers.at(static_cast<size_t>(buffer)).at(value));
    }

    const Function function = reinterpret_cast<Function>(symbol);
    int64_t result = 0;
    for (int i = 0; i < times; ++i) {
        result = function(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15]);
    }
    if (fwrite(&result, sizeof result, 1, stdout) != 1) fail("nobody reads the answer");
    for (const Buffer& buffer : buffers) buffer.write();
    fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
    void* const library = argc > 1 ? dlopen(argv[1], RTLD_NOW) : nullptr;
    if (!library) fail(argc > 1 ? dlerror() : "which library?");
    const int times = argc > 2 ? atoi(argv[2]) : 1;
    for (int64_t length; fread(&length, sizeof length, 1, stdin) == 1;) serve_call(library, times, length);
}
