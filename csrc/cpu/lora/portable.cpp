// Plain C++ for any machine, with the compiler's vectors of 16 bytes.
#include <string.h>

#include "lora/entry.h"

namespace lora_ops {
namespace {

struct Portable {
    typedef float F __attribute__((vector_size(16)));
    using Mask = PortableMask;
    static constexpr int kWidth = 4, kPair = 1, kRows = 2;

    static F zero() { return F{}; }
    template <class T>
    static F load(const T* p) {
        F v;
        memcpy(&v, p, sizeof v);
        return v;
    }
    static void store(float* p, F v) { memcpy(p, &v, sizeof v); }
    static F broadcast(const uint32_t* p) {
        const float x = bits_float(*p);
        return F{x, x, x, x};
    }
    static F multiply_add(F sum, F a, F b) { return sum + a * b; }

    template <class T>
    static void pack_row(const T* x, int64_t n, const uint8_t* bits, uint32_t* out, int64_t width) {
        for (int64_t c = 0; c < width; ++c) out[c] = c < n && is_kept(bits, c) ? float_bits(to_float(x[c])) : 0;
    }

    template <int J, class T>
    static void add_row(T* y, const F (&sums)[J], const uint8_t* bits) {
        add_elements(y, reinterpret_cast<const float*>(sums), J * kWidth, bits);
    }
};

}  // namespace

const LoraKernels kPortableLora = Entry<Portable, Portable>::kernels();

}  // namespace lora_ops
