#include "philox/avx2.h"
#include "philox/mask.h"

namespace lora_ops {
const DropoutMask kAvx2DropoutMask = dropout_mask_rows<Avx2Mask>;
}  // namespace lora_ops
