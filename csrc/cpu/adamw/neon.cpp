#include "adamw/update.h"
#include "blockwise8/neon.h"

namespace lora_ops {
const AdamwKernel kNeonAdamw = adamw<CodedUpdate<NeonBlockwise8>>;
}  // namespace lora_ops
