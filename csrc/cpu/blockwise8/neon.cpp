#include "blockwise8/neon.h"

#include "blockwise8/blockwise8.h"

namespace lora_ops {
const Blockwise8Kernels kNeonBlockwise8 = {blockwise8_quantize<NeonBlockwise8>, blockwise8_dequantize<NeonBlockwise8>};
}  // namespace lora_ops
