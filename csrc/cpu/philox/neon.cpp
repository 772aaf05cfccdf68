#include "philox/neon.h"

#include "philox/mask.h"

namespace lora_ops {
const DropoutMask kNeonDropoutMask = dropout_mask_rows<NeonMask>;
}  // namespace lora_ops
