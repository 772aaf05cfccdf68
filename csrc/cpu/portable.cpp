// Plain C++ for any machine; the compiler vectorizes what it can.
#include <string.h>

#include "gemm.h"
#include "kernels.h"
#include "nf4_table.h"
#include "scalar.h"

#include "nf4.inl"
#include "blockwise8.inl"
#include "gemm.inl"
#include "gemm_f32.inl"
#include "nf4_transposed.inl"
#include "adamw.inl"
#include "checksum.inl"

namespace lora_ops {
namespace {

struct Portable {
    template <class T>
    static uint32_t max_abs_bits(const T* w, int64_t n) {
        uint32_t bits = 0;
        for (int64_t i = 0; i < n; ++i) bits = bits < abs_bits(w[i]) ? abs_bits(w[i]) : bits;
        return bits;
    }

    template <class T>
    static void encode32(const T* w, float scale, uint8_t* packed) {
        for (int i = 0; i < 16; ++i) {
            const int even = nf4_encode(to_float(w[2 * i]) * scale);
            const int odd = nf4_encode(to_float(w[2 * i + 1]) * scale);
            packed[i] = static_cast<uint8_t>(even << 4 | odd);
        }
    }

    template <class T>
    struct Table {
        T value[16];
        explicit Table(float absmax) {
            for (int i = 0; i < 16; ++i) value[i] = round_to<T>(kNF4Code[i] * absmax);
        }
    };

    template <class T>
    static void decode32(const Table<T>& table, const uint8_t* packed, T* out) {
        for (int i = 0; i < 16; ++i) {
            out[2 * i] = table.value[packed[i] >> 4];
            out[2 * i + 1] = table.value[packed[i] & 15];
        }
    }

    static void encode8(const float* x, int64_t n, float scale, const Blockwise8Code& code, uint8_t* codes) {
        for (int64_t i = 0; i < n; ++i) codes[i] = blockwise8_encode(x[i] * scale, code);
    }
    static constexpr auto decode8 = blockwise8_decode;
    static constexpr auto adamw_coded = adamw_update_coded<Portable>;
};

struct PortableFloats {
    typedef float F __attribute__((vector_size(16)));  // a vector register of every 64-bit machine
    using Codec = Portable;
    static constexpr int kLanes = 4, kRows = 4, kVectors = 2;  // 8 accumulators, 2 + 1 operands of 16 registers

    template <class T>
    static Portable::Table<float> table(float absmax) {
        Portable::Table<float> table(absmax);
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

const GemmKernels kPortableGemm = {f32_plan<PortableFloats>, nullptr, f32_task<PortableFloats>};

const Kernels kPortableKernels = {nf4_quantize_any<Portable>, nf4_dequantize_any<Portable>,
                                       nf4_dequantize_transposed_any<Portable, PortableParts>,
                                       nf4_quantize_transposed_any<Portable, PortableParts>, checksum_rows};

const Blockwise8Kernels kPortableBlockwise8 = {blockwise8_quantize<Portable>, blockwise8_dequantize<Portable>, adamw<Portable>};

}  // namespace lora_ops
