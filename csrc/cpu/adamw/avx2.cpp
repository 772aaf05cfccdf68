#include "adamw/update.h"
#include "blockwise8/avx2.h"

namespace lora_ops {
const AdamwKernel kAvx2Adamw = adamw<CodedUpdate<Avx2Blockwise8>>;
}  // namespace lora_ops
