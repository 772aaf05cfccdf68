// What every function of the ABI asks of its arguments.
#pragma once

#include <stdint.h>

#include "lora_ops.h"

namespace lora_ops {

inline bool is_dtype(int64_t dtype) { return dtype == LORA_OPS_F32 || dtype == LORA_OPS_F16 || dtype == LORA_OPS_BF16; }
inline int64_t size_of(int dtype) { return dtype == LORA_OPS_F32 ? 4 : 2; }

inline bool is_valid(const lora_ops_nf4_weight* w) {
    if (!w || w->block_size <= 0 || w->block_size % 32) return false;
    const bool nested = w->absmax_codes && w->absmax_map && w->nested_absmax;
    return w->packed && (w->absmax || nested);
}

}  // namespace lora_ops
