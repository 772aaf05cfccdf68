#include "adamw/avx2.h"

namespace lora_ops {
const AdamwKernel kAvx2Adamw = adamw<Avx2CodedUpdate>;
}  // namespace lora_ops
