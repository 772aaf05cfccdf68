// 8-bit codes with NEON. It has no gathers, so codes and values are looked up one by one as in plain C++.
#pragma once

#include "blockwise8/portable.h"
#include "isa/neon.h"

namespace lora_ops {
namespace {

struct NeonBlockwise8 : PortableBlockwise8 {
    static uint32_t max_abs_bits(const float* x, int64_t n) { return lora_ops::max_abs_bits(x, n); }
};

}  // namespace
}  // namespace lora_ops
