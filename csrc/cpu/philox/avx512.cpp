#include "philox/avx512.h"
#include "philox/mask.h"

namespace lora_ops {
const DropoutMask kAvx512DropoutMask = dropout_mask_rows<Avx512Mask>;
}  // namespace lora_ops
