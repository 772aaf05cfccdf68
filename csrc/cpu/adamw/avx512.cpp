#include "adamw/avx512.h"

namespace lora_ops {
const AdamwKernel kAvx512Adamw = adamw<Avx512CodedUpdate<Avx512LookUp>>;
}  // namespace lora_ops
