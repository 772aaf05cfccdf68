// The NF4 code book (QLoRA, arXiv 2305.14314, appendix E) and the thresholds between its values.
// It stands once in C++; tests compare it with lora_ops.quant.nf4.NF4_CODE.
#pragma once

namespace lora_ops {

constexpr float kNF4Code[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// The fp32 midpoint of neighbours i and i + 1. A value's code is the number of thresholds that it exceeds.
constexpr float nf4_threshold(int i) { return (kNF4Code[i] + kNF4Code[i + 1]) / 2; }

constexpr int kNF4CodeOfZero = 7;

}  // namespace lora_ops
