#include "philox/mask.h"
#include "philox/philox.h"

namespace lora_ops {
const DropoutMask kPortableDropoutMask = dropout_mask_rows<PortableMask>;
}  // namespace lora_ops
