// Routes with NEON and BFMMLA.
#include "gemm/panels_neon_bf16.h"

namespace lora_ops {

const GemmRoute kNeonBf16Panels = neon_bf16_panels();

}  // namespace lora_ops
