// 8-bit codes in plain C++: what codec.h asks of an instruction set.
#pragma once

#include "blockwise8/codec.h"

namespace lora_ops {
namespace {

struct PortableBlockwise8 {
    static uint32_t max_abs_bits(const float* x, int64_t n) { return largest_abs_bits(x, n); }
    static void encode8(const float* x, int64_t n, float scale, const Blockwise8Code& code, uint8_t* codes) {
        for (int64_t i = 0; i < n; ++i) codes[i] = blockwise8_encode(x[i] * scale, code);
    }
    static constexpr auto decode8 = blockwise8_decode;
};

}  // namespace
}  // namespace lora_ops
