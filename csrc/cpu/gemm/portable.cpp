// Routes for any machine, with the compiler's vectors of 16 bytes.
#include <string.h>

#include "gemm/float_dots.h"
#include "gemm/float_panels.h"
#include "nf4/portable.h"

namespace lora_ops {
namespace {

struct PortableFloats {
    typedef float F __attribute__((vector_size(16)));  // a vector register of every 64-bit machine
    using Codec = PortableNF4;
    static constexpr int kLanes = 4, kRows = 4, kVectors = 2;  // 8 accumulators, 2 + 1 operands of 16 registers
    static constexpr bool kGroups = false;

    template <class T>
    static PortableNF4::Table<float> table(float absmax) {
        PortableNF4::Table<float> table(absmax);
        for (float& value : table.value) value = to_float(round_to<T>(value));
        return table;
    }
    static F zero() { return F{}; }
    static F set1(float x) { return F{x, x, x, x}; }
    static F add(F a, F b) { return a + b; }
    static F fma(F a, F b, F c) { return a * b + c; }
    static float sum(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }
    static F load(const float* p) {
        F x;
        memcpy(&x, p, sizeof x);
        return x;
    }
    static void store(float* p, F x) { memcpy(p, &x, sizeof x); }
    template <class T>
    static F load(const T* p) { return F{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
    template <class T>
    static void store(T* p, F x) {
        for (int i = 0; i < kLanes; ++i) p[i] = round_to<T>(x[i]);
    }

    static void transpose(const float* const rows[4], int64_t at, float* out, int64_t stride) {
        for (int i = 0; i < kLanes; ++i) {
            for (int j = 0; j < kLanes; ++j) out[j * stride + i] = rows[i][at + j];
        }
    }
};

}  // namespace

const GemmRoute kPortableDots = float_dots<PortableFloats>();
const GemmRoute kPortablePanels = float_panels<PortableFloats>();

}  // namespace lora_ops
