// The C ABI of dropout masks: checks arguments.
#include "isa/isa.h"
#include "lora_ops.h"
#include "philox/mask.h"

using namespace lora_ops;

int lora_ops_dropout_mask(uint64_t seed, uint32_t offset, uint32_t threshold, int64_t first_row, int64_t rows,
                          int64_t k, uint8_t* bits) {
    if (threshold > 65536 || first_row < 0 || rows < 0 || k < 0) return LORA_OPS_BAD_ARGUMENT;
    if (rows == 0 || k == 0) return LORA_OPS_OK;
    if (!bits) return LORA_OPS_BAD_ARGUMENT;
    const auto mask = for_current_isa<kPortableDropoutMask, kAvx2DropoutMask, kAvx512DropoutMask, kAvx512DropoutMask,
                                      kNeonDropoutMask, kNeonDropoutMask>();
    mask(seed, offset, threshold, first_row, rows, k, bits);
    return LORA_OPS_OK;
}
