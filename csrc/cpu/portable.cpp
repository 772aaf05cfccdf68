// Plain C++ for any machine; the compiler vectorizes what it can.
#include "kernels.h"
#include "nf4_table.h"
#include "scalar.h"

#include "nf4.inl"
#include "blockwise8.inl"

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

    static void encode8(const float* x, int64_t n, float scale, const Blockwise8Search& search, uint8_t* codes) {
        for (int64_t i = 0; i < n; ++i) codes[i] = blockwise8_encode(x[i] * scale, search);
    }
};

}  // namespace

const Kernels kPortableKernels = {nf4_quantize_any<Portable>, nf4_dequantize_any<Portable>,
                                  blockwise8_quantize<Portable>, blockwise8_dequantize};

}  // namespace lora_ops
