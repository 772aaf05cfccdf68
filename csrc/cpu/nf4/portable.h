// The NF4 codec in plain C++: what codec.h asks of an instruction set.
#pragma once

#include "nf4/codec.h"

namespace lora_ops {
namespace {

struct PortableNF4 {
    template <class T>
    static uint32_t max_abs_bits(const T* w, int64_t n) {
        return largest_abs_bits(w, n);
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
};

}  // namespace
}  // namespace lora_ops
