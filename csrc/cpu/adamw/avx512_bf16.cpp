#include "adamw/avx512.h"
#include "blockwise8/avx512_bf16.h"

namespace lora_ops {
const AdamwKernel kAvx512Bf16Adamw = adamw<Avx512CodedUpdate<VbmiLookUp>>;
}  // namespace lora_ops
