#include "adamw/update.h"
#include "blockwise8/portable.h"

namespace lora_ops {
const AdamwKernel kPortableAdamw = adamw<CodedUpdate<PortableBlockwise8>>;
}  // namespace lora_ops
