// The NF4 codec for any machine; the compiler vectorizes what it can.
#include <string.h>

#include "nf4/entry.h"
#include "nf4/portable.h"

namespace lora_ops {
namespace {

struct PortableParts {
    typedef uint16_t V __attribute__((vector_size(16)));
    typedef uint32_t Wide __attribute__((vector_size(16)));
    static constexpr int kParts = 1;
    static constexpr bool kStreams = false;
    static V load(const char* p, int64_t) {
        V v;
        memcpy(&v, p, sizeof v);
        return v;
    }
    static void store(char* p, V v) { memcpy(p, &v, sizeof v); }
    // Compilers see one instruction in each of these.
    template <class T>
    static V low(V a, V b) {
        if constexpr (sizeof(T) == 2) return V{a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3]};
        const Wide c = (Wide)a, d = (Wide)b;
        return (V)Wide{c[0], d[0], c[1], d[1]};
    }
    template <class T>
    static V high(V a, V b) {
        if constexpr (sizeof(T) == 2) return V{a[4], b[4], a[5], b[5], a[6], b[6], a[7], b[7]};
        const Wide c = (Wide)a, d = (Wide)b;
        return (V)Wide{c[2], d[2], c[3], d[3]};
    }
};

}  // namespace

const NF4Kernels kPortableNF4 = nf4_kernels<PortableNF4, PortableParts>();

}  // namespace lora_ops
